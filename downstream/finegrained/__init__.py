"""Fine-grained classification sets, read from the folders that their authors distribute."""
