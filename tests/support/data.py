"""What several tests say about the order of the data."""

import numpy as np

from seitpp.data.order import BatchOrder


def global_batches(order: BatchOrder, steps: range, ranks: int, accumulation: int) -> list[list[int]]:
    """The images of each step, put together from all ranks and micro-batches."""
    shares = [
        list(order.micro_batches(steps, rank=rank, ranks=ranks, accumulation=accumulation))
        for rank in range(ranks)
    ]
    in_turn = [shares[rank][turn] for turn in range(len(steps) * accumulation) for rank in range(ranks)]
    per_step = ranks * accumulation
    return [np.concatenate(in_turn[at : at + per_step]).tolist() for at in range(0, len(in_turn), per_step)]
