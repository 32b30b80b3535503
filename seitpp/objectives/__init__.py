"""What one training step computes."""

from seitpp.objectives.masking import mask_counts, mask_plan, mask_ratio
from seitpp.objectives.mtm import fill_hidden, hidden_tokens, masked_token_accuracy, masked_token_loss
from seitpp.objectives.vq import Discriminator, VGGDistance, VQTraining, quality, restart_due

__all__ = [
    "Discriminator",
    "VGGDistance",
    "VQTraining",
    "fill_hidden",
    "hidden_tokens",
    "mask_counts",
    "mask_plan",
    "mask_ratio",
    "masked_token_accuracy",
    "masked_token_loss",
    "quality",
    "restart_due",
]
