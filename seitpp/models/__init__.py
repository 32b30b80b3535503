"""Token models as timm citizens: `timm.create_model("seit_vit_base", ...)` works after importing this package."""

from seitpp.models import resnet as resnet  # timm learns of them by the import
from seitpp.models.export import export_model, push_model
from seitpp.models.mtm import MTM, MaskedTokens, MaskPlan, load_mtm
from seitpp.models.pretrained import input_kind, input_size, load_pretrained, load_pretrained_tokenadapt
from seitpp.models.release import from_release, save_release, to_release
from seitpp.models.saved import ClassifierSpec, Saved, load_classifier, save_classifier
from seitpp.models.stem import ModelError, StemAdapter
from seitpp.models.tokenadapt import TokenAdapt, load_tokenadapt
from seitpp.models.transfer import choose_trained, classifier_from, pixel_classifier_from
from seitpp.models.vit import TokenEmbed

__all__ = [
    "MTM",
    "ClassifierSpec",
    "MaskPlan",
    "MaskedTokens",
    "ModelError",
    "Saved",
    "StemAdapter",
    "TokenAdapt",
    "TokenEmbed",
    "choose_trained",
    "classifier_from",
    "export_model",
    "from_release",
    "input_kind",
    "input_size",
    "load_classifier",
    "load_mtm",
    "load_pretrained",
    "load_pretrained_tokenadapt",
    "load_tokenadapt",
    "pixel_classifier_from",
    "push_model",
    "save_classifier",
    "save_release",
    "to_release",
]
