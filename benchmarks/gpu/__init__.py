"""What a GPU makes of this project, in one command: python -m benchmarks.gpu."""
