"""A checkpoint as what other programs load."""
