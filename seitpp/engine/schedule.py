"""Learning rates as pure functions of the step."""

import math


def warmup_cosine(
    step: int, steps: int, warmup: int, peak: float, start: float = 0.0, final: float = 0.0
) -> float:
    """The rate of the update number `step` (0 the first) of `steps`: linear from `start` to `peak` over `warmup`
    updates, then half a cosine down to `final`.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    share = (step - warmup) / (steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * share))


def warmup_linear(step: int, steps: int, warmup: int, peak: float) -> float:
    """The rate of update number `step` (0 the first) of `steps`: linear from 0 to `peak` over `warmup` updates,
    then linear to 0.
    """
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / (steps - warmup)
