"""Measurements, one file each; `secateur benchmark` prints them."""
