"""Augmentation of whole batches on their device; every random draw is keyed by what it belongs to."""

from seitpp.augment.images import crop_and_flip
from seitpp.augment.keyed import Keys
from seitpp.augment.maps import crop_resize, random_resized_boxes
from seitpp.augment.mix import SoftLabels
from seitpp.augment.pixels import EvalPixelView, PixelView
from seitpp.augment.views import EvalView, SeitPPFinetuneView, SeitPPView, SeitView, ViewError

__all__ = [
    "EvalPixelView",
    "EvalView",
    "Keys",
    "PixelView",
    "SeitPPFinetuneView",
    "SeitPPView",
    "SeitView",
    "SoftLabels",
    "ViewError",
    "crop_and_flip",
    "crop_resize",
    "random_resized_boxes",
]
