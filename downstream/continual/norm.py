"""Batch norm over the batches of all processes, on every device."""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of the global batch, of equal parts on all processes.

    torch's SyncBatchNorm has no CPU implementation.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        number, values = dist.get_world_size(), input.float()
        mean = all_reduce(values.mean(dim=(0, 2, 3))) / number
        centered = values - mean.view(-1, 1, 1)
        variance = all_reduce(centered.square().mean(dim=(0, 2, 3))) / number
        count = number * input.numel() / input.shape[1]
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(input.dtype)
