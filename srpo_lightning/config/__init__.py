"""What a command is told, and what of it is refused before anything is read."""
