"""The order of class-incremental training: one pass over the tasks, with images from a replay memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from seitpp.data.order import BatchOrder
from seitpp.engine.optim import Schedule
from seitpp.errors import UserError

# With the seed the keys of random numbers; larger than any epoch, the other numbers used with it.
KEYS, DRAWS = 3 << 40, 4 << 40


class ReplayOrder(BatchOrder):
    """One pass over `tasks`, one after the other: each step has a batch of the task and as many from the memory.

    Row u of `tasks` has the indices (n,) int64 of the images of task u. They are shuffled within the task, and its
    last incomplete batch is dropped.

    The memory is a reservoir: each image has a random key, and of the images of all earlier steps those `capacity`
    with the largest keys are in it, a uniformly random part of them. The key depends on (seed, index), so the
    memory before a step is a pure function of seed and step: nothing of it is saved, and all processes have the
    same. What is drawn from it depends on (seed, step). No image is drawn twice in a step, unless the memory holds
    fewer than a batch: then all are drawn equally often, up to one. The first step, and every step without
    `capacity`, has images of the task alone.

    Raises UserError if a task has fewer images than a batch.
    """

    def __init__(self, tasks: Sequence[np.ndarray], batch_size: int, seed: int, *, capacity: int):
        sizes = [len(images) // batch_size for images in tasks]
        if min(sizes) < 1:
            task = int(np.argmin(sizes))
            raise UserError(
                f"task {task + 1} of {len(tasks)} has {len(tasks[task])} training images, expected at least the "
                f"{batch_size} of a batch: pass fewer --tasks or a smaller --batch-size"
            )
        super().__init__(sum(sizes) * batch_size, batch_size, seed)
        self.capacity, self.ends = capacity, np.cumsum(sizes).tolist()
        self._pass = np.concatenate(
            [
                self._random(task).permutation(images)[: size * batch_size]
                for task, (images, size) in enumerate(zip(tasks, sizes, strict=True))
            ]
        )
        self._keys = self._random(KEYS).random(self._pass.max() + 1)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Return the images (num_images,) int64 of the pass, which is the only epoch."""
        return self._pass

    def tasks_seen(self, step: int) -> int:
        """Return the number of tasks that the first `step` steps have begun."""
        return int(np.searchsorted(self.ends, step)) + 1

    def memory(self, step: int) -> np.ndarray:
        """Return the images (n,) int64 that are in the memory before a step, the largest key first."""
        return self._kept(self._pass[: step * self.batch_size])

    def micro_batches(self, steps: range, *, rank: int, ranks: int, accumulation: int) -> Iterator[np.ndarray]:
        """Yield the images of this rank for each micro-batch of `steps`: of the task, then of the memory."""
        memory = self.memory(steps.start)
        for step in steps:
            current = self._pass[step * self.batch_size :][: self.batch_size]
            parts = [np.split(images, ranks * accumulation) for images in (current, self._drawn(memory, step))]
            for micro in range(accumulation):
                yield np.concatenate([part[micro * ranks + rank] for part in parts])
            memory = self._kept(np.concatenate([memory, current]))

    def _kept(self, images: np.ndarray) -> np.ndarray:
        # A stable sort takes linear time where all but a batch are sorted already.
        return images[np.argsort(-self._keys[images], kind="stable")[: self.capacity]]

    def _drawn(self, memory: np.ndarray, step: int) -> np.ndarray:
        chosen = self._random(DRAWS + step).choice(len(memory), min(len(memory), self.batch_size), replace=False)
        return np.resize(memory[chosen], self.batch_size if len(memory) else 0)

    def _random(self, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, number]))


@dataclass(frozen=True)
class TaskSchedule(Schedule):
    """The schedule of a ReplayOrder: one pass with a constant learning rate, and an evaluation after each task."""

    order: ReplayOrder

    @classmethod
    def one_pass(cls, order: ReplayOrder, *, lr: float, checkpoint_epochs: float) -> "TaskSchedule":
        """Create the schedule, with a checkpoint after this part of the pass, again and again."""
        return cls(
            order,
            steps=order.steps_per_epoch,
            warmup_steps=0,
            checkpoint_steps=max(1, order.steps(checkpoint_epochs)),
            evaluation_steps=order.steps_per_epoch,
            peak_lr=lr,
            min_lr=lr,
        )

    def is_evaluated(self, step: int) -> bool:
        """Return whether a task ends after `step` updates."""
        return step in self.order.ends
