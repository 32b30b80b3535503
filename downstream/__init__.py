"""Downstream tasks of token models: one package for each task, installed together with seitpp."""
