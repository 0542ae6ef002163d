"""`python -m secateur`: the same as the command."""

from secateur.search.cli import app

app(prog_name="secateur")
