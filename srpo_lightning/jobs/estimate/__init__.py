"""Memory, predicted."""
