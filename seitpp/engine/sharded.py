"""Tensors that FSDP splits over the processes, made whole and split again; other tensors stay as they are."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the device of its parts. Every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors in the host's memory. Every process must call this; without `keep` it gets nothing."""
    kept = {}
    for name, tensor in tensors.items():
        found = whole(tensor.detach())
        if keep:
            kept[name] = found.cpu()
    return kept


def split_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor put where `other` is: on its device and, if `other` is split, this process's part of it.

    A scalar (an optimizer's step counter) is never split.
    """
    tensor = tensor.to(other.device)
    if tensor.ndim == 0 or not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def split_module_as(module: nn.Module, other: nn.Module) -> None:
    """Split every tensor of a module as that of the same name in `other` is."""
    places = other.state_dict()
    tensors = {name: split_as(tensor, places[name]) for name, tensor in module.state_dict().items()}
    module.load_state_dict(tensors, assign=True)
