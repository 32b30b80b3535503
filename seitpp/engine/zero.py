"""DeepSpeed's ZeRO, stages 1 and 2: its settings, and the optimizer's state by parameter name.

Every process holds all weights, in float32; gradients and the optimizer's state are split. DeepSpeed lays the
weights of a parameter group end to end and gives each process one part of the row, which its optimizer updates.
"""

from types import MethodType

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, convert_outputs_to_fp32
from timm.optim import Lamb
from torch import Tensor, nn

from seitpp.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, beside the counter "step"


def supports(plugin: DeepSpeedPlugin) -> bool:
    """Whether the launch is one of these stages, with everything on the device."""
    return plugin.zero_stage in (1, 2) and plugin.offload_optimizer_device in (None, "none")


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError for LAMB, which needs the norm of each weight, where a part of a row holds many weights."""
    if isinstance(optimizer, Lamb):
        raise UserError("LAMB with DeepSpeed: expected a launch with DDP or FSDP, or --optimizer adamw")


def configure(
    accelerator: Accelerator, model: nn.Module, batch_size: int, accumulation: int, clip: float | None
) -> None:
    """Before Accelerate's `prepare`: what the recipe asks for, whatever the launcher's file says.

    DeepSpeed's own bf16 would make the weights bf16: the forward pass gets the autocast of every other launch.
    """
    settings = accelerator.deepspeed_plugin.deepspeed_config
    settings["gradient_accumulation_steps"] = accumulation
    settings["train_micro_batch_size_per_gpu"] = batch_size // accelerator.num_processes // accumulation
    settings["gradient_clipping"] = clip or 0.0
    if accelerator.mixed_precision == "bf16":
        del settings["bf16"]
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        model.forward = MethodType(convert_outputs_to_fp32(autocast(type(model).forward)), model)


class ZeroOptimizer:
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
