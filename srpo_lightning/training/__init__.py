"""Optimizers, precision, ranks and times."""
