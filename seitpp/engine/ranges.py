"""The range of every number among the settings of the recipes, by the name of the setting.

A name means the same in every recipe, so it has one range. A pair or list is checked number by number, and None,
where a setting may be None, is no number.
"""

import dataclasses
import math
import re
import sys
from fractions import Fraction
from typing import NamedTuple

from seitpp.books import MAX_DIGITS
from seitpp.errors import UserError

MOST = 2**31 - 1
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Range(NamedTuple):
    """The numbers from `low` to `high`; without `low` itself if `above`, without `high` itself if `below`.

    The numbers of a setting with several must not fall if `rising`.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    rising: bool = False

    def holds(self, number: float) -> bool:
        """Return whether a number is in the range; no range has inf or nan."""
        low = self.low < number if self.above else self.low <= number
        high = number < self.high if self.below else number <= self.high
        return low and high and abs(number) <= sys.float_info.max  # an int can be larger

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.above else f"at least {self.low:g}"
        high = f"less than {self.high:g}" if self.below else f"at most {self.high:g}"
        text = low if self.high >= MOST else f"{low} and {high}"
        return f"{text}, the smaller first" if self.rising else text


COUNT, COUNT_OR_ZERO, POSITIVE, NOT_NEGATIVE = Range(1, MOST), Range(0, MOST), Range(0, above=True), Range(0)
FRACTION, SHARE, RATE = Range(0, 1), Range(0, 1, above=True), Range(0, 1, below=True)
ANY = Range(-math.inf)

RANGES = {
    **dict.fromkeys(("accumulation", "log_steps", "steps", "evaluation_steps", "batch_size"), COUNT),
    **dict.fromkeys(
        ("batch_size_per_process", "images", "measured", "rounds", "labels_per_class", "window_shards"), COUNT
    ),
    **dict.fromkeys(("tasks", "crops"), COUNT),
    **dict.fromkeys(("image_size", "load_size", "crop_size", "size", "eval_window", "short_side"), COUNT),
    "patch_size": COUNT,
    "digits": Range(1, MAX_DIGITS),
    **dict.fromkeys(("sliding_window", "stride", "patch", "bands", "code_dim", "num_codes", "fit_images"), COUNT),
    **dict.fromkeys(("width", "depth", "heads", "channels", "attack_images", "square_queries"), COUNT),
    **dict.fromkeys(("seeds", "updates", "score_passes"), COUNT),
    **dict.fromkeys(("decoder_width", "decoder_depth", "decoder_heads"), COUNT),
    **dict.fromkeys(
        ("workers", "warmup_steps", "hold_out", "refine_steps", "warmup_updates", "task"), COUNT_OR_ZERO
    ),
    **dict.fromkeys(("epochs", "checkpoint_epochs", "evaluation_epochs", "clip"), POSITIVE),
    **dict.fromkeys(("warmup_epochs", "warmup_lr", "min_lr", "weight_decay", "temperature"), NOT_NEGATIVE),
    **dict.fromkeys(("base_lr", "lr", "mixup", "cutmix"), NOT_NEGATIVE),
    **dict.fromkeys(("tokenadapt_fraction", "identity", "region", "flip", "masked_share"), FRACTION),
    **dict.fromkeys(("fraction", "max_share", "layer_decay"), SHARE),
    **dict.fromkeys(("uniform", "by_score", "resolution", "token_fractions"), SHARE),
    **dict.fromkeys(("dropout", "drop_path", "smoothing", "ema", "betas"), RATE),
    "eps": Range(0, 255, above=True),
    "crop_scale": SHARE._replace(rising=True),
    "scale": POSITIVE._replace(rising=True),
    "scales": POSITIVE,
    "intensity": ANY._replace(rising=True),
    "ignore_label": ANY,
    "jpeg_quality": Range(0, 100),
    "seed": Range(0, 2**32 - 1),
}


def out_of_range(config: object) -> str | None:
    """Return what is wrong with the first number of a config that is out of its range, None if none is."""
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), RANGES.get(field.name)
        numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if _is_number(number)]
        if allowed is None or not numbers:
            continue
        if not all(map(allowed.holds, numbers)) or (allowed.rising and sorted(numbers) != numbers):
            given = " ".join(f"{number:g}" if isinstance(number, float) else str(number) for number in numbers)
            return f"--{field.name.replace('_', '-')} {given}: expected {allowed}"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_bytes(text: str, flag: str) -> int:
    """Read a number of bytes: "0", "574MB" (10^6), "574.2MiB" (2^20), "24.6kB".

    Raises UserError, which names `flag`, for another text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text.strip().lower())
    unit = UNITS.get(match[2] or "b") if match else None
    if match is None or unit is None:
        raise UserError(f"{flag} {text}: expected a number of bytes such as 574MB, 574.2MiB, 24.6kB or 0")
    return int(Fraction(match[1]) * unit)
