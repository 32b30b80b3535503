"""Cross-entropy of a linear layer whose logits are never all there: a chunk of tokens at a time, gradients too.

Logits of 16,384 codes for the hidden tokens of 64 images take 1.8 GB, and autograd would keep several copies. Here
each chunk is used up before the next one is made: the forward pass finds the gradients too, of the size of what
went in, and the backward pass only scales them. It is one operator, so that a compiled model has one graph for any
number of tokens.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Logits of a chunk: on a CPU they stay in its cache; elsewhere more, to be worth the launches of its kernels.
CHUNK_CELLS = {"cpu": 1 << 20, "cuda": 1 << 24}


def linear_cross_entropy(vectors: Tensor, table: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the logits `vectors @ table.T + bias` in nats, and their accuracy in [0, 1].

    `vectors` (N, D), `table` (K, D) and `bias` (K,) float, `targets` (N,) int64 in [0, K) -> two float32 (). Under
    autocast the product has its dtype, all else is float32. Gradients go to `vectors` and `bias`, none to `table`.
    """
    kind = vectors.device.type
    # The meta device, where operations are counted, has none.
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    product = torch.get_autocast_dtype(kind) if autocast else vectors.dtype
    loss, accuracy, _, _ = _linear_cross_entropy(vectors, table.detach(), bias, targets, product)
    return loss, accuracy


@torch.library.custom_op("seitpp::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    vectors: Tensor, table: Tensor, bias: Tensor, targets: Tensor, product: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and accuracy, and the gradients of the loss in `vectors` and `bias`, all float32."""
    tokens, codes = len(vectors), len(table)
    rows, columns = table.float(), table.to(product).T
    loss, correct = rows.new_zeros(()), targets.new_zeros(())
    vectors_grad = torch.empty_like(vectors, dtype=torch.float32)
    # What a code's own tokens ask of its bias is a whole number: exact in any order.
    bias_grad = rows.new_zeros(codes).index_add_(0, targets, rows.new_ones(tokens)).neg_()
    size = max(1, CHUNK_CELLS.get(vectors.device.type, CHUNK_CELLS["cuda"]) // codes)
    with torch.autocast(vectors.device.type, enabled=False):
        for chunk, wanted, grad in zip(*(t.split(size) for t in (vectors, targets, vectors_grad)), strict=True):
            logits = (chunk.to(product) @ columns).float().add_(bias)
            highest, likeliest = logits.max(dim=1, keepdim=True)
            correct += (likeliest.squeeze(1) == wanted).sum()
            picked = logits.gather(1, wanted.unsqueeze(1))
            weights = logits.sub_(highest).exp_()
            total = weights.sum(dim=1, keepdim=True)
            loss += (total.log() + highest - picked).sum()
            torch.div(weights @ rows, total, out=grad).sub_(rows[wanted])
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
    # Scaled in float32 first: what fp16 cannot hold before a GradScaler's factor, it can after.
    vectors_grad, bias_grad = (
        (grad * loss_grad).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return vectors_grad, None, bias_grad, None, None


_linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@register_flop_formula(torch.ops.seitpp.linear_cross_entropy)
def _flops(vectors: tuple[int, ...], table: tuple[int, ...], *_, **__) -> int:
    """Two products, the logits and the gradient of `vectors`, in the forward pass; none in the backward pass."""
    return 2 * 2 * vectors[0] * table[0] * table[1]
