"""Datasets and data loaders: batches of ids or pixels, the order of training images, and the embedded data."""
