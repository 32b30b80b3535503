"""Semantic segmentation on tokens with mmsegmentation's heads and metric; no other package imports mmseg."""
