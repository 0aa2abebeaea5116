"""Reading and writing: whole, checked, and nothing foreign that runs."""
