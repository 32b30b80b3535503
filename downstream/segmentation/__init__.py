"""Semantic segmentation on tokens with mmsegmentation's heads and metric; only this package imports mmseg."""
