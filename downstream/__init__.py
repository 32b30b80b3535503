"""What models of tokens are used for: a room for each task, importable and installed beside seitpp."""
