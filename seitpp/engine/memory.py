"""The memory of a training step on a GPU, computed without one: the step runs on fake tensors, which hold no data.

What the forward pass saves for the backward pass grows with the micro-batch and decides how many images fit;
weights, gradients and the state of the optimizer have a constant size. Every storage counts once.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seitpp.engine.precision import COMPUTE_DTYPE

# (micro-batch size, device, model, *other modules) -> loss (): a step on zeros that allocates as a real one does.
Trial = Callable[..., Tensor]

COUNTED = 64, 128  # micro-batch sizes that are measured; memory is a linear function of the size
MOMENTS = 2  # values that Adam and LAMB keep for each weight


class Footprint(NamedTuple):
    """Bytes of a step, without weights, gradients and optimizer.

    `saved` is what the forward pass saves per image for the backward pass, `peak` the maximum per image during
    both, `fixed` what does not depend on the number of images, such as weights in half precision.
    """

    saved: int
    peak: int
    fixed: int


def footprint(trial: Trial, precision: str, model: nn.Module, *beside: nn.Module) -> Footprint:
    """Return the memory of a training step of `model` on a GPU in this precision. Nothing is computed.

    `beside` are modules that the step uses and does not train: a tokenizer, TokenAdapt.
    """
    few, many = COUNTED
    counts = [_count(trial, images, precision, model, *beside) for images in COUNTED]
    (saved_few, peak_few), (saved_many, peak_many) = counts
    saved, peak = (saved_many - saved_few) / (many - few), (peak_many - peak_few) / (many - few)
    return Footprint(round(saved), round(peak), max(0, round(peak_few - few * peak)))


def state_bytes(model: nn.Module, processes: int) -> int:
    """Return the bytes that the first step adds to the weights: gradients and the state of the optimizer, and with
    several processes the buffers that send gradients.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return trained * (1 + MOMENTS + (processes > 1))


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process can still allocate on a GPU; None for another device."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _count(trial: Trial, images: int, precision: str, *modules: nn.Module) -> tuple[int, int]:
    """Return (bytes saved for the backward pass, bytes at the peak), both without the weights."""
    saved = {}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    shadows, own = _shadows(modules, fake)
    _autocast(shadows[0].train(), COMPUTE_DTYPE[precision])
    with fake:

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        with _LiveBytes() as live, _gpu_kernels():
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = trial(images, torch.device("cpu"), *shadows)
            loss.backward()
    return sum(saved.values()), live.peak


def _shadows(modules: tuple[nn.Module, ...], mode: FakeTensorMode) -> tuple[list[nn.Module], set[int]]:
    """Return copies of the modules with fake weights, and the storages of these weights.

    They are on the fake CPU, since autograd needs a real CUDA device for fake CUDA tensors.
    """
    fakes = {}
    with mode:
        for tensor in (tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]):
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if parameter else fake
    own = {fake.untyped_storage()._cdata for fake in fakes.values()}
    return [copy.deepcopy(module, fakes) for module in modules], own


def _autocast(model: nn.Module, dtype: torch.dtype) -> None:
    """Apply the autocast that Accelerate applies to a model.

    Its cache is off: with it, a checkpointed block would save other tensors when it is recomputed in backward.
    """
    if dtype != torch.float32:
        autocast = torch.autocast("cpu", dtype, cache_enabled=False)
        model.forward = MethodType(convert_outputs_to_fp32(autocast(type(model).forward)), model)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages, and keeps their maximum in `peak`."""

    def __init__(self):
        super().__init__()
        self._alive, self._now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._alive:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, storage: int) -> None:
        self._now -= self._alive.pop(storage)


@contextmanager
def _gpu_kernels() -> Iterator[None]:
    """Replace dropout and attention by the CUDA kernels: a boolean dropout mask, no attention matrix in memory.

    A TorchFunctionMode would miss the calls of blocks that are recomputed in the backward pass.
    """
    before = F.dropout, F.scaled_dot_product_attention
    F.dropout, F.scaled_dot_product_attention = _dropout, _attention
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = before


def _dropout(tensor: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(tensor, p, True)[0] if training and p else tensor


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **rest
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.dtype == torch.float32 or attn_mask is not None:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, True, dropout_p, **rest)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, **rest)[0]
