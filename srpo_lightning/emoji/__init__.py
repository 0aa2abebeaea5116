"""How the built-in small model was made: `python -m srpo_lightning.emoji build`."""
