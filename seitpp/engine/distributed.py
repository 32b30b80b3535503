"""The kinds of launch: one process or DDP, FSDP 2, DeepSpeed's ZeRO 1 and 2, behind the same few calls.

Under FSDP every process holds a part of each tensor. Under ZeRO it holds all weights, in float32, but only a part
of the gradients and of the optimizer's state: DeepSpeed lays the weights of a parameter group end to end and gives
each process one part of the row, which its optimizer updates.
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

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, beside the counter "step"


class UpdateSettings(NamedTuple):
    """How an update is made: the global batch, its micro-batches on each process, the largest gradient norm."""

    batch_size: int
    accumulation: int
    clip: float | None


class Launch:
    """One process, or DDP: every process holds all weights and the whole state of the optimizer."""

    splits_training = False  # whether weights or the optimizer's state are split over the processes

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise UserError for an optimizer that this launch would change."""

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ModelEmaV3 | None, settings: UpdateSettings
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and the optimizer as this launch runs them."""
        return self.accelerator.prepare(model, optimizer)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> "OptimizerState":
        """What a checkpoint keeps of an optimizer that `prepare` was given."""
        return OptimizerState(optimizer)

    def grad_norm(self, wrapped: nn.Module, clip: float | None) -> Tensor:
        """Clip the gradients to the norm `clip`, if there is one, and return the norm before () on the device."""
        return whole(self.accelerator.clip_grad_norm_(wrapped.parameters(), clip or math.inf).detach())

    def unsharded(self, module: nn.Module) -> nn.Module:
        """The module with all of its weights. Every process must call this."""
        return module


class ShardedLaunch(Launch):
    """FSDP 2: each process holds a part of every weight."""

    splits_training = True

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ModelEmaV3 | None, settings: UpdateSettings
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Also splits the moving average as the model is split."""
        self._template = copy.deepcopy(model).cpu()
        prepared = super().prepare(model, optimizer, ema, settings)
        if ema:
            split_module_as(ema.module, model)
        return prepared

    def unsharded(self, module: nn.Module) -> nn.Module:
        """A copy with all weights."""
        copied = copy.deepcopy(self._template)
        copied.load_state_dict(gather(module.state_dict()))
        return copied.to(self.accelerator.device)


class ZeroLaunch(Launch):
    """DeepSpeed's ZeRO, stages 1 and 2: each process updates a part of the weights, from a copy of its own."""

    splits_training = True

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise UserError for LAMB, which needs the norm of each weight: a part of a row holds many weights."""
        if isinstance(optimizer, Lamb):
            raise UserError("LAMB with DeepSpeed: expected a launch with DDP or FSDP, or --optimizer adamw")

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ModelEmaV3 | None, settings: UpdateSettings
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Also writes the recipe's settings into DeepSpeed's."""
        configure(self.accelerator, model, settings)
        return super().prepare(model, optimizer, ema, settings)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> "OptimizerState":
        """Gathered from all processes."""
        return ZeroOptimizerState(optimizer)

    def grad_norm(self, wrapped: nn.Module, clip: float | None) -> Tensor:
        """DeepSpeed has clipped in the backward pass; the norm is fetched from it."""
        norm = self.accelerator.clip_grad_norm_(wrapped.parameters(), clip or math.inf)
        return torch.tensor(norm, device=self.accelerator.device)


def find_launch(accelerator: Accelerator) -> Launch:
    """The kind of this launch.

    Raises RunError unless Accelerate sees the processes that were launched, as one process, DDP, FSDP 2, or ZeRO 1
    or 2.
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
            f"launched with {kind.value} of a kind that is not supported here (DeepSpeed's stages 1 and 2 without "
            "offloading are): to split the weights too take FSDP of version 2, accelerate launch --config_file "
            "recipes/accelerate/fsdp.yaml"
        )
    kinds = {DistributedType.FSDP: ShardedLaunch, DistributedType.DEEPSPEED: ZeroLaunch}
    return kinds.get(kind, Launch)(accelerator)


def supports(plugin: DeepSpeedPlugin) -> bool:
    """Whether a DeepSpeed launch is one of these stages, with everything on the device."""
    return plugin.zero_stage in (1, 2) and plugin.offload_optimizer_device in (None, "none")


def configure(accelerator: Accelerator, model: nn.Module, update: UpdateSettings) -> None:
    """Give DeepSpeed, before Accelerate's `prepare`, what the recipe asks for, whatever the launcher's file says.

    DeepSpeed's own bf16 would make the weights bf16: the forward pass gets the autocast of every other launch.
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
    """The state of an optimizer, by "parameter name/key"."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The state of the parameters of `model`, each process's own part of it."""
        state = {
            f"{name}/{key}": value
            for name, parameter in model.named_parameters()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }
        counters = self._counters()
        return state | {f"{name}/step": counters[p] for name, p in model.named_parameters() if p in counters}

    def restore(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Take a state that `tensors` gave."""
        parameters, counters = dict(model.named_parameters()), self._counters()
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition("/")
            parameter = parameters[name]
            if key == "step" and parameter in counters:
                counters[parameter].copy_(tensor)
            else:  # the step counter of AdamW too: a fused optimizer keeps it beside its parameter
                self._optimizer.state[parameter][key] = split_as(tensor, parameter)

    def _counters(self) -> dict[nn.Parameter, Tensor]:
        """Of an optimizer that counts its updates once a group, as timm's LAMB does, each counter by the first
        parameter of its group, with which a checkpoint keeps it.
        """
        groups = self._optimizer.param_groups
        return {group["params"][0]: group["step"] for group in groups if "step" in group}


class ZeroOptimizerState(OptimizerState):
    """The state of an Adam optimizer that Accelerate has prepared for ZeRO, whole, by "parameter name/key".

    The methods gather from, or give to, all processes, each of which must call them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._parts = [part for group in optimizer.param_groups for part in group["params"]]
        self._state = optimizer.state
        # DeepSpeed looks for the state of all groups after it has updated the first: here all have theirs by then.
        for part in self._parts:
            moments = {key: torch.zeros_like(part) for key in MOMENTS}
            self._state[part] = {"step": torch.zeros((), device=part.device), **moments}

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The state after one update or more, in the host's memory."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self._state[self._parts[0]]["step"]
        found = {}
        for name, parameter in _trained(model).items():
            found[f"{name}/step"] = step.to("cpu", copy=True)
            for key in MOMENTS:
                found[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key).cpu()
        return found

    def restore(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Take the weights of `model` and the state `tensors`, before the first update.

        DeepSpeed splits nothing but weights at that time, so each moment is split as if it were the weights.
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
    """Put tensors where the optimizer has the weights of the same names."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in parameters.items():
        safe_set_full_fp32_param(parameter, tensors[name])


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
