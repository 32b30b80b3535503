"""Half precision: which of them a device has, and the loss scale that fp16 needs.

The smallest gradients are zero in fp16, so the loss is multiplied by a scale before the backward pass and the
gradients are divided by it afterwards. Where gradients overflow, the update is skipped: weights and optimizer stay
as they are, the scale is halved, and the step counts all the same (learning rate, moving average, data and logs go
on). After 2000 updates without an overflow the scale is doubled.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

from seitpp.engine.folder import RunError

COMPUTE_DTYPE = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device, zero: bool) -> None:
    """Raise RunError for a precision that the device does not compute in, or that does not go with DeepSpeed."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise RunError(
            f"--precision bf16 on {torch.cuda.get_device_name(device)}, which has no bfloat16 (compute capability "
            "8.0 and later have): pass --precision fp16"
        )
    if precision == "fp16" and zero:
        raise RunError(
            "--precision fp16 with DeepSpeed, whose own loss scale no checkpoint of ours holds: pass --precision "
            "bf16 or no, or launch with recipes/accelerate/eight_gpus.yaml or fsdp.yaml"
        )


class LossScaler:
    """The loss scale of a run in fp16. To be made before Accelerate prepares model and optimizer."""

    def __init__(self, accelerator: Accelerator):
        if accelerator.scaler is None:  # Accelerate would compute in float32 on a CPU and not say so
            accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
            accelerator.native_amp = True
        self._scaler = accelerator.scaler

    def step(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Update unless a gradient is not finite. Returns the `loss_scale` of this update and whether it was
        `skipped`, 1 or 0, both () float32.

        Nothing here waits for the device: a fused optimizer leaves its own update out there.
        """
        scale = self._scaler._get_scale_async()
        before = scale.clone()
        optimizer.step()
        return {"loss_scale": before, "skipped": (scale < before).float()}

    def tensors(self) -> dict[str, Tensor]:
        """The state: `scale` () float32, and `growth_tracker` () int32, updates since the last overflow."""
        state = self._scaler.state_dict()
        return {
            "scale": torch.tensor(state["scale"], dtype=torch.float32),
            "growth_tracker": torch.tensor(state["_growth_tracker"], dtype=torch.int32),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on with a state that `tensors` gave."""
        found = {"scale": tensors["scale"].item(), "_growth_tracker": tensors["growth_tracker"].item()}
        self._scaler.load_state_dict(self._scaler.state_dict() | found)


def check_scale(records: list[dict]) -> None:
    """Raise RunError where the loss scale of an update is below 1: then gradients overflow by themselves."""
    for record in records:
        if record.get("loss_scale", 1) < 1:
            raise RunError(
                f"the loss scale fell to {record['loss_scale']:g} at step {record['step']}: gradients overflow in "
                "fp16 at any scale; lower the learning rate, or pass --precision bf16 or no"
            )
