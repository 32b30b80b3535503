"""Augmentation of whole batches on their device; random numbers depend only on seed, epoch and image index."""

from seitpp.augment.boxes import CentralBoxes, RandomBoxes
from seitpp.augment.color import ColorPreset
from seitpp.augment.crops import Crops
from seitpp.augment.geometry import Geometry, apply_geometry, random_geometry
from seitpp.augment.images import crop_and_flip
from seitpp.augment.keyed import Keys
from seitpp.augment.maps import crop_resize, random_resized_boxes
from seitpp.augment.mix import SoftLabels
from seitpp.augment.pixels import EvalPixelView, PixelView
from seitpp.augment.views import EvalView, SeitPPFinetuneView, SeitPPView, SeitView, ViewError

__all__ = [
    "CentralBoxes",
    "ColorPreset",
    "Crops",
    "EvalPixelView",
    "EvalView",
    "Geometry",
    "Keys",
    "PixelView",
    "RandomBoxes",
    "SeitPPFinetuneView",
    "SeitPPView",
    "SeitView",
    "SoftLabels",
    "ViewError",
    "apply_geometry",
    "crop_and_flip",
    "crop_resize",
    "random_geometry",
    "random_resized_boxes",
]
