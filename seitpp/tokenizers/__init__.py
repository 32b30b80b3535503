"""Images <-> ids: vector-quantizing tokenizers behind one protocol."""

from seitpp.tokenizers.base import Tokenizer, TokenizerError, TokenizerSpec, nearest
from seitpp.tokenizers.patch_kmeans import PatchKMeans, load

__all__ = ["PatchKMeans", "Tokenizer", "TokenizerError", "TokenizerSpec", "load", "nearest"]
