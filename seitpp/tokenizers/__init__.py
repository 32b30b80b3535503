"""Vector-quantizing tokenizers, from images to ids and back, with one interface."""

from seitpp.tokenizers import adapters
from seitpp.tokenizers.base import Tokenizer, TokenizerError, TokenizerSpec, by_frequency
from seitpp.tokenizers.counts import Usage, code_counts, restart_dead_codes, tally, usage
from seitpp.tokenizers.dct import PatchDCT
from seitpp.tokenizers.feature_kmeans import FeatureKMeans, open_network
from seitpp.tokenizers.loading import Kind, load
from seitpp.tokenizers.patch_kmeans import PatchKMeans
from seitpp.tokenizers.refined import RefinedPatchKMeans, refine
from seitpp.tokenizers.vit_vqgan import ViTVQGAN
from seitpp.tokenizers.vqgan import VQGAN

__all__ = [
    "VQGAN",
    "FeatureKMeans",
    "Kind",
    "PatchDCT",
    "PatchKMeans",
    "RefinedPatchKMeans",
    "Tokenizer",
    "TokenizerError",
    "TokenizerSpec",
    "Usage",
    "ViTVQGAN",
    "adapters",
    "by_frequency",
    "code_counts",
    "load",
    "open_network",
    "refine",
    "restart_dead_codes",
    "tally",
    "usage",
]
