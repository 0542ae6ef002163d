"""A run: its folder, its study, its workers, and the loop that fills them."""
