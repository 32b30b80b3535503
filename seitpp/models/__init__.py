"""Models of image tokens, which this package registers with timm: `timm.create_model("seit_vit_base", ...)`."""

from seitpp.models import resnet as resnet  # the import registers the models with timm
from seitpp.models.masking import MaskPlan
from seitpp.models.mtm import MTM, MaskedTokens
from seitpp.models.stem import ModelError, StemAdapter
from seitpp.models.tokenadapt import TokenAdapt
from seitpp.models.vit import TokenEmbed
from seitpp.models.weights.classifiers import ClassifierSpec, Loaded, load_classifier, save_classifier
from seitpp.models.weights.pretrained import (
    input_kind,
    input_size,
    load_mtm,
    load_pretrained,
    load_pretrained_tokenadapt,
    load_tokenadapt,
    save_pretrained,
)
from seitpp.models.weights.release import from_release, save_release, to_release
from seitpp.models.weights.transfer import (
    classifier_from,
    new_pixel_classifier,
    pixel_classifier_from,
    set_trainable,
)

__all__ = [
    "MTM",
    "ClassifierSpec",
    "Loaded",
    "MaskPlan",
    "MaskedTokens",
    "ModelError",
    "StemAdapter",
    "TokenAdapt",
    "TokenEmbed",
    "classifier_from",
    "from_release",
    "input_kind",
    "input_size",
    "load_classifier",
    "load_mtm",
    "load_pretrained",
    "load_pretrained_tokenadapt",
    "load_tokenadapt",
    "new_pixel_classifier",
    "pixel_classifier_from",
    "save_classifier",
    "save_pretrained",
    "save_release",
    "set_trainable",
    "to_release",
]
