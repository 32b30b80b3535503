"""Load the weights of the perceptual distance from torchvision's file."""

from pathlib import Path

from seitpp.models.perceptual import VGGDistance
from seitpp.models.stem import ModelError
from seitpp.tensors import load_state_dict


def load_vgg_distance(path: str | Path) -> VGGDistance:
    """Load the VGG16 distance from torchvision's weights file, without unpickling it.

    Raises ModelError naming the file if it is missing or holds other weights.
    """
    if not Path(path).is_file():
        raise ModelError(f"no VGG16 weights at {path}: expected the file of torchvision's vgg16")
    tensors = load_state_dict(Path(path), ModelError, lambda name: name.startswith("features."))
    try:
        return VGGDistance(tensors)
    except ModelError as error:
        raise ModelError(f"{path} holds {error}") from error
