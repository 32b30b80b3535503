"""Training losses, and the metrics computed with them."""

from seitpp.models.masking import MASK_RATIOS, MaskRatio, mask_plan
from seitpp.objectives.adapt import adapt_loss
from seitpp.objectives.classify import soft_label_loss, top1_accuracy
from seitpp.objectives.mtm import masked_token_accuracy, masked_token_loss
from seitpp.objectives.vq import VQTraining, restart_due

__all__ = [
    "MASK_RATIOS",
    "MaskRatio",
    "VQTraining",
    "adapt_loss",
    "mask_plan",
    "masked_token_accuracy",
    "masked_token_loss",
    "restart_due",
    "soft_label_loss",
    "top1_accuracy",
]
