"""Augmentation of whole batches on their device; every random draw is keyed by what it belongs to."""

from seitpp.augment.images import crop_and_flip
from seitpp.augment.keyed import Keys
from seitpp.augment.maps import crop_resize, random_resized_boxes
from seitpp.augment.views import EvalView, SeitPPView

__all__ = ["EvalView", "Keys", "SeitPPView", "crop_and_flip", "crop_resize", "random_resized_boxes"]
