"""The supported launches behind one interface: one process, DDP, FSDP 2, and DeepSpeed's ZeRO 1 and 2.

Under FSDP every process holds a part of each tensor. Under ZeRO it holds all weights, in float32, but only a part
of the gradients and of the optimizer's state: DeepSpeed concatenates the weights of a parameter group into one
vector and assigns one slice of it to each process, whose optimizer updates that slice.
"""

import copy
import math
from collections.abc import Mapping
from types import MethodType
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, convert_outputs_to_fp32
from timm.optim import Lamb
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from seitpp.engine.folder import RunError
from seitpp.engine.system import launched_processes
from seitpp.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")  # the state of Adam for each weight, besides the counter "step"


class UpdateSettings(NamedTuple):
    """The settings of an update: global batch size, micro-batches on each process, and the norm to clip to."""

    batch_size: int
    accumulation: int
    clip: float | None


class Launch:
    """A launch of one process or with DDP: every process holds all weights and the whole optimizer state."""

    splits_training = False  # whether weights or the optimizer's state are split over the processes

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise UserError for an optimizer that would compute something else under this launch."""

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ema: ModelEmaV3 | None,
        settings: UpdateSettings,
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the model and the optimizer as Accelerate wraps them for this launch."""
        return self.accelerator.prepare(model, optimizer)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> "OptimizerState":
        """Return the part of an optimizer that a checkpoint stores; call after `prepare`."""
        return OptimizerState(optimizer)

    def grad_norm(self, wrapped: nn.Module, clip: float | None) -> Tensor:
        """Clip the gradients to the norm `clip`, if given, and return their norm before that, () on the device."""
        return whole(self.accelerator.clip_grad_norm_(wrapped.parameters(), clip or math.inf).detach())

    def unsharded(self, module: nn.Module) -> nn.Module:
        """Return the module with all of its weights. Every process must call this."""
        return module


class ShardedLaunch(Launch):
    """A launch with FSDP 2: each process holds a part of every weight."""

    splits_training = True

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ema: ModelEmaV3 | None,
        settings: UpdateSettings,
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap the model and the optimizer, and split the moving average as the model is split."""
        self._template = copy.deepcopy(model).cpu()
        prepared = super().prepare(model, optimizer, ema=ema, settings=settings)
        if ema:
            split_module_as(ema.module, model)
        return prepared

    def unsharded(self, module: nn.Module) -> nn.Module:
        """Return a copy with all weights. Every process must call this."""
        copied = copy.deepcopy(self._template)
        copied.load_state_dict(gather(module.state_dict()))
        return copied.to(self.accelerator.device)


class ZeroLaunch(Launch):
    """A launch with DeepSpeed's ZeRO 1 or 2: each process updates its part of the weights."""

    splits_training = True

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise UserError for LAMB, which needs the norm of each weight, while a slice holds many weights."""
        if isinstance(optimizer, Lamb):
            raise UserError(
                "--optimizer lamb: got a launch with DeepSpeed, expected DDP or FSDP: launch with one of them, "
                "or pass --optimizer adamw"
            )

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ema: ModelEmaV3 | None,
        settings: UpdateSettings,
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap the model and the optimizer, after the recipe's settings are written into DeepSpeed's."""
        configure(self.accelerator, model, settings)
        return super().prepare(model, optimizer, ema=ema, settings=settings)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> "OptimizerState":
        """Return an optimizer state that is gathered from all processes."""
        return ZeroOptimizerState(optimizer)

    def grad_norm(self, wrapped: nn.Module, clip: float | None) -> Tensor:
        """Return the norm of the gradients, which DeepSpeed has clipped in the backward pass already."""
        norm = self.accelerator.clip_grad_norm_(wrapped.parameters(), clip or math.inf)
        return torch.tensor(norm, device=self.accelerator.device)


def find_launch(accelerator: Accelerator) -> Launch:
    """Return the launch of this process.

    Raises RunError unless Accelerate sees as many processes as were launched, as one process or with DDP, FSDP 2,
    or ZeRO 1 or 2 without offloading.
    """
    launched, processes = launched_processes(), accelerator.num_processes
    if launched != processes:
        raise RunError(
            f"{launched} processes were launched, but Accelerate sees {processes}, so each would train alone: "
            "without a GPU set ACCELERATE_USE_CPU=1"
        )
    kind, plugin = accelerator.distributed_type, accelerator.deepspeed_plugin
    if (plugin and not supports(plugin)) or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise RunError(
            f"launcher settings: got an unsupported version or stage of {kind.value}, expected DDP, FSDP 2, or "
            "DeepSpeed's ZeRO 1 or 2 without offloading: to split the weights too, use accelerate launch "
            "--config_file recipes/accelerate/fsdp.yaml"
        )
    kinds = {DistributedType.FSDP: ShardedLaunch, DistributedType.DEEPSPEED: ZeroLaunch}
    return kinds.get(kind, Launch)(accelerator)


def supports(plugin: DeepSpeedPlugin) -> bool:
    """Return whether a DeepSpeed launch is ZeRO 1 or 2 without offloading."""
    return plugin.zero_stage in (1, 2) and plugin.offload_optimizer_device in (None, "none")


def configure(accelerator: Accelerator, model: nn.Module, update: UpdateSettings) -> None:
    """Write the recipe's settings over those of the launcher's file; call before Accelerate's `prepare`.

    DeepSpeed's own bf16 would convert the weights to bf16, so it is replaced by the autocast that Accelerate gives
    to the forward pass in every other launch.
    """
    settings = accelerator.deepspeed_plugin.deepspeed_config
    settings["gradient_accumulation_steps"] = update.accumulation
    settings["train_micro_batch_size_per_gpu"] = (
        update.batch_size // accelerator.num_processes // update.accumulation
    )
    settings["gradient_clipping"] = update.clip or 0.0
    if accelerator.mixed_precision == "bf16":
        del settings["bf16"]
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        model.forward = MethodType(convert_outputs_to_fp32(autocast(type(model).forward)), model)


class OptimizerState:
    """The state of an optimizer as tensors named "parameter name/key"."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state of the parameters of `model`; where it is split, this process's part of it."""
        state = {
            f"{name}/{key}": value
            for name, parameter in model.named_parameters()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }
        counters = self._counters()
        return state | {f"{name}/step": counters[p] for name, p in model.named_parameters() if p in counters}

    def restore(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load the state `tensors`, which are whole; where the parameter is split, each process takes its part.

        Raises KeyError or ValueError for those of another model.
        """
        parameters, counters = dict(model.named_parameters()), self._counters()
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition("/")
            parameter = parameters[name]
            if tensor.ndim and tensor.shape != parameter.shape:
                raise ValueError(f"{full_name} is {tuple(tensor.shape)}, its parameter {tuple(parameter.shape)}")
            if key == "step" and parameter in counters:
                counters[parameter].copy_(tensor)
            else:  # with AdamW's step counter, which a fused optimizer keeps on the device of its parameter
                self._optimizer.state[parameter][key] = split_as(tensor, parameter)

    def _counters(self) -> dict[nn.Parameter, Tensor]:
        """Map the first parameter of each group to the group's step counter, which timm's LAMB has and AdamW has
        not: a checkpoint stores it under the name of that parameter.
        """
        groups = self._optimizer.param_groups
        return {group["params"][0]: group["step"] for group in groups if "step" in group}


class ZeroOptimizerState(OptimizerState):
    """The state of an Adam optimizer under ZeRO as whole tensors named "parameter name/key".

    It is created after Accelerate's `prepare`. Its methods communicate: every process must call them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._parts = [part for group in optimizer.param_groups for part in group["params"]]
        self._state = optimizer.state
        # After its first group, DeepSpeed already reads the state of all groups, so all must exist by then.
        for part in self._parts:
            moments = {key: torch.zeros_like(part) for key in MOMENTS}
            self._state[part] = {"step": torch.zeros((), device=part.device), **moments}

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state on the CPU. There must have been an update."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self._state[self._parts[0]]["step"]
        state = {}
        for name, parameter in _trained(model).items():
            state[f"{name}/step"] = step.to("cpu", copy=True)
            for key in MOMENTS:
                state[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key).cpu()
        return state

    def restore(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load the weights of `model` and the state `tensors`; call before the first update.

        Before it, DeepSpeed can split only weights, so each moment is set as the weights and copied from there.
        """
        trained = _trained(model)
        for key in MOMENTS:
            _split_weights(trained, {name: tensors[f"{name}/{key}"] for name in trained})
            for part in self._parts:
                self._state[part][key].copy_(part.detach())
        _split_weights(trained, {name: parameter.detach() for name, parameter in trained.items()})
        step = tensors[f"{next(iter(trained))}/step"]
        for part in self._parts:
            self._state[part]["step"].copy_(step)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _split_weights(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Set the optimizer's copies of the weights to the tensors of the same names."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in parameters.items():
        safe_set_full_fp32_param(parameter, tensors[name])


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor of which each process may hold a part. Every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Return whole tensors on the CPU; an empty dict without `keep`. Every process must call this."""
    kept = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())
        if keep:
            kept[name] = gathered.cpu()
    return kept


def split_as(tensor: Tensor, other: Tensor) -> Tensor:
    """Move a whole tensor to the device of `other` and, if `other` is split, split it in the same way.

    A scalar (an optimizer's step counter) is never split.
    """
    tensor = tensor.to(other.device)
    if tensor.ndim == 0 or not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def split_module_as(module: nn.Module, other: nn.Module) -> None:
    """Split every tensor of a module as the tensor of the same name in `other` is split."""
    others = other.state_dict()
    tensors = {name: split_as(tensor, others[name]) for name, tensor in module.state_dict().items()}
    module.load_state_dict(tensors, assign=True)
