"""`python -m secateur`: the same as the command."""

from secateur.search.cli import app

if __name__ == "__main__":  # worker processes import this module again under another name
    app(prog_name="secateur")
