"""Short programs that show how to use the project."""
