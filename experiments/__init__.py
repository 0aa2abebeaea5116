"""What was found out with the package."""
