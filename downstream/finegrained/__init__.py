"""Fine-grained classification data sets, read from the folders that their authors distribute."""
