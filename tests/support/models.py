"""Models that cost milliseconds, of the digits' shapes."""

from seitpp.models import MTM


def tiny_mtm(**changes) -> MTM:
    """A masked token model of 8 x 8 tokens of 64 codes in 32 dimensions, but for `changes`."""
    sizes = {"encoder": "mtm_vit_nano", "grid": (8, 8), "num_codes": 64, "code_dim": 32}
    decoder = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 1}
    return MTM(**{**sizes, **decoder, **changes})
