"""Devices measured: runtimes, latency tables, and whole models against them."""
