"""Ids become batches: datasets, the order of a training, and the embedded images."""
