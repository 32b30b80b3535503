"""Memory of a training step on a GPU, counted without one: the step is taken on tensors that hold no data.

What a forward pass saves for the backward pass grows with the images at a time and decides how many fit; weights,
gradients and the optimizer's state do not grow. Every storage counts once.
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

# (images at a time, device, model, modules beside it ..) -> loss (): a step on zeros, with all that takes memory.
Trial = Callable[..., Tensor]

COUNTED = 64, 128  # images at a time, between which memory is a straight line
MOMENTS = 2  # of Adam and LAMB, of each weight


class Footprint(NamedTuple):
    """Bytes of a step: what an image `saved` for the backward pass, what it takes at the `peak` of forward and
    backward pass, and what is `fixed`, at any number of images (weights in half precision), all beside weights,
    gradients and optimizer.
    """

    saved: int
    peak: int
    fixed: int


def footprint(trial: Trial, precision: str, model: nn.Module, *beside: nn.Module) -> Footprint:
    """Count a step of `model` as a GPU would do it in this precision. Nothing is computed.

    Modules `beside` it are those that the step needs too and does not train: a tokenizer, TokenAdapt.
    """
    few, many = COUNTED
    counts = [_count(trial, images, precision, model, *beside) for images in COUNTED]
    (saved_few, peak_few), (saved_many, peak_many) = counts
    saved, peak = (saved_many - saved_few) / (many - few), (peak_many - peak_few) / (many - few)
    return Footprint(round(saved), round(peak), max(0, round(peak_few - few * peak)))


def state_bytes(model: nn.Module, processes: int) -> int:
    """Bytes that the first step adds to the weights: gradients, the optimizer's state, and on several processes
    the buffers in which gradients are sent.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return trained * (1 + MOMENTS + (processes > 1))


def free_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that this process can still take; None for another device."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _count(trial: Trial, images: int, precision: str, *modules: nn.Module) -> tuple[int, int]:
    """(bytes saved for the backward pass, bytes at the peak), both without the weights."""
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
    """The modules with weights that hold no data; and the storages of these.

    On the CPU, since autograd asks for a CUDA device where a tensor says that it lies on one.
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
    """Half precision as Accelerate gives it to a model.

    Without autocast's cache: a checkpointed block, done again in the backward pass, would find other tensors.
    """
    if dtype != torch.float32:
        autocast = torch.autocast("cpu", dtype, cache_enabled=False)
        model.forward = MethodType(convert_outputs_to_fp32(autocast(type(model).forward)), model)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there ever were."""

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
    """Dropout with a mask of bools and attention without its matrix, as CUDA has them and the CPU has not.

    A TorchFunctionMode would not see what is done again in the backward pass.
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
