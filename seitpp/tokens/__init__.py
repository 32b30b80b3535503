"""Ids get meaning: codebook vectors, batches, and the embedded data set."""
