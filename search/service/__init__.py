"""The search service: HTTP in front of searches, which run as processes of their own and outlive the server."""
