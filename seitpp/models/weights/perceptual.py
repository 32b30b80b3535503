"""The weights of the perceptual distance, from torchvision's file."""

from pathlib import Path

from seitpp.models.perceptual import VGGDistance
from seitpp.models.stem import ModelError
from seitpp.tensors import load_state_dict


def load_vgg_distance(path: str | Path) -> VGGDistance:
    """The distance by torchvision's file of VGG16 weights, which is not unpickled.

    Raises ModelError naming the file if it is missing or holds anything else.
    """
    if not Path(path).is_file():
        raise ModelError(f"no VGG16 weights at {path}: expected torchvision's vgg16 file")
    tensors = load_state_dict(Path(path), ModelError, lambda name: name.startswith("features."))
    try:
        return VGGDistance(tensors)
    except ModelError as error:
        raise ModelError(f"{path} holds {error}") from error
