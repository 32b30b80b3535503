"""What one training step computes."""

from seitpp.objectives.masking import mask_counts, mask_plan, mask_ratio
from seitpp.objectives.mtm import fill_hidden, hidden_tokens, masked_token_accuracy, masked_token_loss

__all__ = [
    "fill_hidden",
    "hidden_tokens",
    "mask_counts",
    "mask_plan",
    "mask_ratio",
    "masked_token_accuracy",
    "masked_token_loss",
]
