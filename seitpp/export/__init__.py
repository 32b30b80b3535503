"""A finished run as a folder for others: weights and configuration for timm and the hub, with a model card."""

from seitpp.export.model import EXPORTED, export_model, push_model

__all__ = ["EXPORTED", "export_model", "push_model"]
