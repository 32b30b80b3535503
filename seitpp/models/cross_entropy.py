"""Fused linear layer and cross-entropy, computed in chunks of tokens so that the logits are never stored whole.

Logits of 16,384 codes for the hidden tokens of 64 images take 1.8 GB, and autograd would keep several copies. Here
the forward pass computes the loss and the gradients of one chunk, frees its logits, and goes on to the next chunk;
the backward pass only scales these gradients. All of it is one custom operator, so that a compiled model has one
graph for any number of tokens.
"""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Logits per chunk: few enough for the cache of a CPU; on a GPU, enough to outweigh the cost of kernel launches.
CHUNK_CELLS = {"cpu": 1 << 20, "cuda": 1 << 24}


def linear_cross_entropy(
    vectors: Float[Tensor, "tokens dim"],
    table: Float[Tensor, "codes dim"],
    bias: Float[Tensor, " codes"],
    *,
    targets: Int64[Tensor, " tokens"],
) -> tuple[Float32[Tensor, ""], Float32[Tensor, ""]]:
    """Return the mean cross-entropy (nats) and the accuracy in [0, 1] of the logits `vectors @ table.T + bias`.

    `targets` are in [0, codes). Under autocast the matrix product uses the autocast dtype; everything else is
    float32. `vectors` and `bias` receive gradients, `table` does not.
    """
    kind = vectors.device.type
    # The meta device, on which FLOPs are counted, has no autocast.
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    product = torch.get_autocast_dtype(kind) if autocast else vectors.dtype
    loss, accuracy, _, _ = _linear_cross_entropy(vectors, table.detach(), bias, targets, product)
    return loss, accuracy


@torch.library.custom_op("seitpp::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    vectors: Tensor, table: Tensor, bias: Tensor, targets: Tensor, product: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, the accuracy, and the gradients of the loss for `vectors` and `bias`, all float32."""
    tokens, codes = len(vectors), len(table)
    rows, columns = table.float(), table.to(product).T
    loss, correct = rows.new_zeros(()), targets.new_zeros(())
    vectors_grad = torch.empty_like(vectors, dtype=torch.float32)
    # Its gradient begins with minus the number of tokens per code: whole numbers, exact in any order of addition.
    bias_grad = rows.new_zeros(codes).index_add_(0, targets, rows.new_ones(tokens)).neg_()
    size = max(1, CHUNK_CELLS.get(vectors.device.type, CHUNK_CELLS["cuda"]) // codes)
    with torch.autocast(vectors.device.type, enabled=False):
        for chunk, target, grad in zip(*(t.split(size) for t in (vectors, targets, vectors_grad)), strict=True):
            logits = (chunk.to(product) @ columns).float().add_(bias)
            highest, predicted = logits.max(dim=1, keepdim=True)
            correct += (predicted.squeeze(1) == target).sum()
            picked = logits.gather(1, target.unsqueeze(1))
            weights = logits.sub_(highest).exp_()
            total = weights.sum(dim=1, keepdim=True)
            loss += (total.log() + highest - picked).sum()
            torch.div(weights @ rows, total, out=grad).sub_(rows[target])
            bias_grad.addmv_(weights.T, total.squeeze(1).reciprocal())
    return loss / tokens, correct / tokens, vectors_grad.div_(tokens), bias_grad.div_(tokens)


@_linear_cross_entropy.register_fake
def _shapes(vectors: Tensor, table: Tensor, bias: Tensor, targets: Tensor, product: torch.dtype):
    scalar = vectors.new_empty((), dtype=torch.float32)
    grads = (torch.empty_like(t, dtype=torch.float32) for t in (vectors, bias))
    return scalar, torch.empty_like(scalar), *grads


def _keep_gradients(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = inputs[0].dtype, inputs[2].dtype


def _scale_gradients(ctx, loss_grad: Tensor, *_) -> tuple:
    # Scale in float32, then cast: before the factor of a GradScaler is applied, gradients underflow in fp16.
    vectors_grad, bias_grad = (
        (grad * loss_grad).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return vectors_grad, None, bias_grad, None, None


_linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@register_flop_formula(torch.ops.seitpp.linear_cross_entropy)
def _flops(vectors: tuple[int, ...], table: tuple[int, ...], *_, **__) -> int:
    """Count the two products of the forward pass: the logits, and the gradient of `vectors`."""
    return 2 * 2 * vectors[0] * table[0] * table[1]
