"""Load tokenizer files of every kind that seitpp writes, and public ViT-VQGAN checkpoints."""

from pathlib import Path

from torch import Tensor

from seitpp.tensors import is_checkpoint, load_tensors
from seitpp.tokenizers import patch_kmeans, refined, vit_vqgan
from seitpp.tokenizers.base import HEADER, Tokenizer, TokenizerError, TokenizerSpec
from seitpp.tokenizers.patch_kmeans import PatchKMeans, patch_values
from seitpp.tokenizers.refined import RefinedPatchKMeans
from seitpp.tokenizers.vit_vqgan import ViTVQGAN

KINDS = (patch_kmeans.KIND, refined.KIND, vit_vqgan.KIND)


def load(name_or_path: str | Path) -> Tokenizer:
    """Load a tokenizer in eval mode from a file that `save` wrote, or from a ViT-VQGAN checkpoint.

    Raises TokenizerError naming the file if it is missing or damaged, or holds anything else.
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
    if kind not in KINDS:
        raise TokenizerError(
            f"{path} holds no known tokenizer: its header says {kind!r}, expected one of {', '.join(KINDS)}"
        )
    return _filled(TokenizerSpec.from_json(spec), tensors, path)


def _filled(spec: TokenizerSpec, tensors: dict[str, Tensor], path: Path) -> Tokenizer:
    # Checked before anything is allocated, since the header can claim any size.
    expected = {"codebook": (spec.num_codes, spec.code_dim), "mean": (patch_values(spec),)}
    for name, shape in expected.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise TokenizerError(
                f"{path} is not a complete {spec.kind} tokenizer: expected {name} of shape {shape} by its header"
            )
    tokenizer = PatchKMeans(spec) if spec.kind == patch_kmeans.KIND else RefinedPatchKMeans(spec)
    try:
        tokenizer.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise TokenizerError(f"{path} is not a complete {spec.kind} tokenizer: {reason}") from error
    return tokenizer.eval()
