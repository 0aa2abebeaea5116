"""What is measured on pictures, and how two kinds of weights compare."""
