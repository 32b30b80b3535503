"""Export a finished run to a folder for timm and the Hugging Face hub: weights, configuration and a model card."""

from seitpp.export.model import EXPORTED, export_model, push_model

__all__ = ["EXPORTED", "export_model", "push_model"]
