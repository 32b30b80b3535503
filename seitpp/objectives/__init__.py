"""What one training step computes."""

from seitpp.objectives.adapt import adapt_loss, augment_directly, token_accuracy
from seitpp.objectives.classify import soft_label_loss, top1_share
from seitpp.objectives.masking import MASK_LAWS, MaskLaw, mask_plan
from seitpp.objectives.mtm import fill_hidden, hidden_tokens, masked_token_accuracy, masked_token_loss
from seitpp.objectives.vq import Discriminator, VGGDistance, VQTraining, quality, restart_due

__all__ = [
    "MASK_LAWS",
    "Discriminator",
    "MaskLaw",
    "VGGDistance",
    "VQTraining",
    "adapt_loss",
    "augment_directly",
    "fill_hidden",
    "hidden_tokens",
    "mask_plan",
    "masked_token_accuracy",
    "masked_token_loss",
    "quality",
    "restart_due",
    "soft_label_loss",
    "token_accuracy",
    "top1_share",
]
