"""Open a tokenizer file of any kind that we write, and ViT-VQGAN checkpoints of others."""

from pathlib import Path

from torch import Tensor

from seitpp.tensors import is_checkpoint, load_tensors
from seitpp.tokenizers import patch_kmeans, refined, vit_vqgan
from seitpp.tokenizers.base import HEADER, Tokenizer, TokenizerError, TokenizerSpec
from seitpp.tokenizers.patch_kmeans import PatchKMeans
from seitpp.tokenizers.refined import RefinedPatchKMeans
from seitpp.tokenizers.vit_vqgan import ViTVQGAN


def load(name_or_path: str | Path) -> Tokenizer:
    """Open a tokenizer file, in eval mode: one that `save` wrote, or a ViT-VQGAN checkpoint.

    Raises TokenizerError naming the file if it is missing, damaged or foreign.
    """
    path = Path(name_or_path)
    if not path.is_file():
        raise TokenizerError(f"no tokenizer file at {path}: expected one that save() wrote, or a checkpoint")
    if is_checkpoint(path):
        return ViTVQGAN.from_checkpoint(path)
    spec, tensors = load_tensors(path, HEADER, TokenizerError)
    kind = (spec or {}).get("kind", vit_vqgan.KIND if vit_vqgan.CODEBOOK in tensors else None)
    if kind == vit_vqgan.KIND:
        return ViTVQGAN.from_checkpoint(path)
    if kind not in (patch_kmeans.KIND, refined.KIND):
        raise TokenizerError(f"{path} holds no tokenizer that we know (its header says {kind!r})")
    return _filled(TokenizerSpec.from_json(spec), tensors, path)


def _filled(spec: TokenizerSpec, tensors: dict[str, Tensor], path: Path) -> Tokenizer:
    # Before anything is allocated: the header can claim any size.
    claimed = {"codebook": (spec.num_codes, spec.code_dim), "mean": (3 * spec.patch**2,)}
    for name, shape in claimed.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise TokenizerError(f"{path} is no whole {spec.kind} tokenizer: its header wants {name} of {shape}")
    tokenizer = PatchKMeans(spec) if spec.kind == patch_kmeans.KIND else RefinedPatchKMeans(spec)
    try:
        tokenizer.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise TokenizerError(f"{path} is no whole {spec.kind} tokenizer: {reason}") from error
    return tokenizer.eval()
