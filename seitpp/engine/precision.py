"""Half precision: which of bf16 and fp16 a device supports, and the loss scale that fp16 needs.

Small gradients underflow to zero in fp16, so the loss is multiplied by a scale before the backward pass and the
gradients are divided by it afterwards. If gradients overflow, the update is skipped: weights and optimizer stay
unchanged and the scale is halved, but the step still counts for learning rate, moving average, data and logs.
After 2000 updates without an overflow the scale is doubled.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

from seitpp.engine.folder import RunError

COMPUTE_DTYPE = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device, zero: bool) -> None:
    """Raise RunError if the device does not support the precision, or for fp16 under DeepSpeed (`zero`)."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise RunError(
            f"--precision bf16 on {torch.cuda.get_device_name(device)}, which has no bfloat16 (compute capability "
            "8.0 and later have): pass --precision fp16"
        )
    if precision == "fp16" and zero:
        raise RunError(
            "--precision fp16 with DeepSpeed: a checkpoint cannot store DeepSpeed's loss scale: pass --precision "
            "bf16 or no, or launch with recipes/accelerate/eight_gpus.yaml or fsdp.yaml"
        )


class LossScaler:
    """The loss scale of a run in fp16. It must be created before Accelerate prepares model and optimizer."""

    def __init__(self, accelerator: Accelerator):
        if accelerator.scaler is None:  # Accelerate would compute in float32 on a CPU and not say so
            accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
            accelerator.native_amp = True
        self._scaler = accelerator.scaler

    def step(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Update the weights unless a gradient is not finite.

        Returns the `loss_scale` of this update, and `skipped`, 1 if it was skipped, else 0; both () float32. This
        does not wait for the device, where a fused optimizer decides itself whether to skip.
        """
        scale = self._scaler._get_scale_async()
        before = scale.clone()
        optimizer.step()
        return {"loss_scale": before, "skipped": (scale < before).float()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the state: `scale` () float32, and `growth_tracker` () int32, updates since the scale changed."""
        state = self._scaler.state_dict()
        return {
            "scale": torch.tensor(state["scale"], dtype=torch.float32),
            "growth_tracker": torch.tensor(state["_growth_tracker"], dtype=torch.int32),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load a state that `tensors` returned."""
        state = {"scale": tensors["scale"].item(), "_growth_tracker": tensors["growth_tracker"].item()}
        self._scaler.load_state_dict(self._scaler.state_dict() | state)


def check_scale(records: list[dict]) -> None:
    """Raise RunError if the loss scale of an update is below 1: gradients then overflow without any scale."""
    for record in records:
        if record.get("loss_scale", 1) < 1:
            raise RunError(
                f"the loss scale fell to {record['loss_scale']:g} at step {record['step']}: gradients overflow in "
                "fp16 at any scale; lower the learning rate, or pass --precision bf16 or no"
            )
