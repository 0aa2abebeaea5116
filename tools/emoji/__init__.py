"""How the built-in small model was made: `python -m tools.emoji build`."""
