"""Compare a training step of masked token modeling with a plain PyTorch model and with a large matrix product.

    python tests/bench/mtm_step.py [--batch 8] [--rounds 5]
    python tests/bench/mtm_step.py --batch 256    # on a GPU: bf16, compiled
    python tests/bench/mtm_step.py --codes 391 16384 65536 --batch 32    # the nano model, for each K

A step is augmentation (without TokenAdapt, or with it on half of the images, with random weights), forward, loss,
backward and update of the published ViT-B, with a mask ratio of 0.55 and with dropout; the ids are in memory. The
first row is forward, loss and backward alone. torch counts the floating-point operations of the model, forward and
backward. `TextbookMTM` below is the same model in plain PyTorch with the same weights; its loss is checked to be
the same. Our steps, its steps and matrix products of the same precision alternate, and the best round of each is
reported. On a CPU, time is the CPU time divided by the number of threads, which other processes disturb less.
With `--codes` a step is forward, loss and backward alone; peak memory is that of the process so far.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seitpp.augment import Keys, SeitPPView
from seitpp.engine.metrics import count_flops, matmul_rate
from seitpp.engine.optim import adamw
from seitpp.engine.system import peak_memory
from seitpp.models import MTM, MaskPlan, TokenAdapt
from seitpp.objectives import MASK_RATIOS, mask_plan

Loss = Callable[[Tensor, MaskPlan], Tensor]
STORED, CROP, CODES, PATCHES, RATIO = 32, 28, 391, 196, 0.55
COUNTS = MASK_RATIOS["seitpp"].counts(PATCHES, RATIO)
NANO = {"encoder": "mtm_vit_nano", "decoder_width": 96, "decoder_depth": 2, "decoder_heads": 4}
# Our names of weights -> those of the plain model.
TEXTBOOK_NAMES = {
    "encoder.patch_embed.proj": "stem",
    "encoder.patch_embed.": "",
    "encoder.": "",
    "head.": "",
    ".attn.": ".",
    ".mlp.": ".",
}


class TextbookBlock(nn.Module):
    """A pre-norm transformer block in plain PyTorch."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.dropout = heads, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p if self.training else 0.0)
        x = x + self.dropout(self.proj(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(self.norm2(x))))))


class TextbookMTM(nn.Module):
    """`seitpp.models.MTM` in plain PyTorch, with the settings and weights of `model`; the loss uses all logits."""

    def __init__(self, model: MTM):
        super().__init__()
        settings, encoder = model.settings, model.encoder
        width, heads, patches = (
            encoder.embed_dim,
            encoder.blocks[0].attn.num_heads,
            encoder.patch_embed.num_patches,
        )
        dim, dropout, narrow = (settings[name] for name in ("code_dim", "dropout", "decoder_width"))
        self.token_emb, self.token_norm = nn.Embedding(settings["num_codes"], dim), nn.LayerNorm(dim, eps=1e-6)
        self.dropout, self.stem = nn.Dropout(dropout), nn.Conv2d(dim, width, 2, 2)
        self.cls_token, self.mask_token = (nn.Parameter(torch.empty(1, 1, width)) for _ in range(2))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, width), requires_grad=False)
        self.blocks = nn.Sequential(*(TextbookBlock(width, heads) for _ in encoder.blocks))
        self.norm, self.decoder_embed = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, narrow)
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, 1 + patches, narrow))
        self.decoder_blocks = nn.Sequential(
            *(TextbookBlock(narrow, settings["decoder_heads"], dropout) for _ in model.decoder_blocks)
        )
        self.decoder_norm = nn.LayerNorm(narrow, eps=1e-6)
        # The head: a linear layer for the four tokens of a patch, and the norm of each token.
        self.fc, self.head_norm = nn.Linear(narrow, 4 * dim), nn.LayerNorm(dim, eps=1e-6)
        self.bias = nn.Parameter(torch.empty(settings["num_codes"]))
        weights = {name.replace("head.norm", "head_norm"): value for name, value in model.state_dict().items()}
        for ours, its in TEXTBOOK_NAMES.items():
            weights = {name.replace(ours, its): value for name, value in weights.items()}
        self.load_state_dict(weights)

    def forward(self, ids: Tensor, plan: MaskPlan) -> Tensor:
        """Ids (B, H, W) int64 and a mask plan -> loss () in nats per hidden token."""
        x = self.dropout(self.token_norm(self.token_emb(ids))).permute(0, 3, 1, 2)
        x = self.stem(x).flatten(2).transpose(1, 2)
        hidden, kept = plan.hidden.unsqueeze(-1), plan.kept.unsqueeze(-1)
        x = torch.where(hidden, self.mask_token, x) + self.pos_embed[:, 1:]
        x = x.gather(1, kept.expand(-1, -1, x.shape[2]))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = self.decoder_embed(self.norm(self.blocks(torch.cat([cls, x], dim=1))))
        cls = x[:, :1]
        patches = cls.repeat(1, hidden.shape[1], 1).scatter(1, kept.expand(-1, -1, x.shape[2]), x[:, 1:])
        x = torch.cat([cls, torch.where(hidden, cls, patches)], dim=1) + self.decoder_pos_embed
        x = self.fc(self.decoder_norm(self.decoder_blocks(x))[:, 1:]).unflatten(2, (4, -1))
        logits = self.head_norm(F.gelu(x)) @ self.token_emb.weight.detach().T + self.bias
        batch, height, width = ids.shape
        targets = ids.view(batch, height // 2, 2, width // 2, 2).transpose(2, 3).reshape(batch, -1, 4)
        losses = F.cross_entropy(logits.flatten(0, 2).float(), targets.flatten(), reduction="none")
        losses = losses.view(targets.shape).mean(dim=2)
        return (losses * plan.hidden).sum() / plan.hidden.sum()


def model_flops(model: MTM) -> int:
    """Return the floating-point operations per image, forward and backward."""
    ids = torch.zeros(1, CROP, CROP, dtype=torch.long, device="meta")
    return count_flops(model, ids, mask_plan(torch.zeros(1, PATCHES, device="meta"), *COUNTS), ids)


def check_same_loss(model: MTM, textbook: TextbookMTM, ids: Tensor) -> None:
    """Raise AssertionError unless both models have the same loss."""
    plan = some_plan(len(ids), ids.device)
    with torch.no_grad():
        losses = model.eval()(ids, plan, targets=ids).loss, textbook.eval()(ids, plan)
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)


def training_step(
    model: nn.Module,
    *,
    loss: Loss,
    get_ids: Callable[[], Tensor],
    update: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], None]:
    """Return the measured function: mask, forward, loss and backward for ids of `get_ids`, and maybe an update."""
    optimizer = adamw(model.train(), 0.05, betas=(0.9, 0.95))
    if device.type == "cuda":
        model.compile()

    def step() -> None:
        ids = get_ids()
        plan = some_plan(len(ids), device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss(ids, plan)
        value.backward()
        if update:
            optimizer.step()
        optimizer.zero_grad()
        value.item()  # waits for the device

    return step


def both_steps(
    device: torch.device, dtype: torch.dtype, *, batch: int, tokenadapt_fraction: float, alone: bool
) -> list[Callable[[], None]]:
    """Return a step of our model and one of the plain model, with equal weights.

    If `alone`, a step has no augmentation and no update.
    """
    adapt = TokenAdapt() if tokenadapt_fraction else None
    view = SeitPPView(torch.randn(CODES, 32), size=CROP, adapt=adapt, tokenadapt_fraction=tokenadapt_fraction)
    view, keys = view.to(device), Keys(0, 0, torch.arange(batch, device=device))
    stored = torch.randint(CODES, (batch, STORED, STORED), device=device)
    cropped = stored[:, :CROP, :CROP].contiguous()
    ours = MTM().to(device)
    textbook = TextbookMTM(ours).to(device)
    check_same_loss(ours, textbook, cropped)

    def get_ids() -> Tensor:
        return cropped if alone else view(stored, keys)

    settings = {"get_ids": get_ids, "update": not alone, "device": device, "dtype": dtype}
    return [
        training_step(ours, loss=our_loss(ours), **settings),
        training_step(textbook, loss=textbook, **settings),
    ]


def our_loss(model: MTM) -> Loss:
    return lambda ids, plan: model(ids, plan, targets=ids).loss


def some_plan(batch: int, device: torch.device) -> MaskPlan:
    return mask_plan(Keys(0, 0, torch.arange(batch, device=device)).uniform("mask", PATCHES), *COUNTS)


def clock() -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time() / torch.get_num_threads()


def timed(step: Callable[[], None]) -> float:
    start = clock()
    step()
    return clock() - start


def compare_steps(device: torch.device, dtype: torch.dtype, *, batch: int, rounds: int) -> None:
    """Print the table for the published ViT-B."""
    flops = model_flops(MTM())
    print(f"{flops / 1e9:.1f} GFLOP per image")
    print(
        f"{'step':12} {'images/s':>9} {'matmul, GFLOP/s':>16} {'ratio':>6} {'textbook':>9} {'CPU time / its':>15}"
    )
    for name, fraction, alone in (("model", 0.0, True), ("crop", 0.0, False), ("TokenAdapt", 0.5, False)):
        steps = both_steps(device, dtype, batch=batch, tokenadapt_fraction=fraction, alone=alone)
        for step in steps:
            step()
        rates, times = [], []
        for _ in range(rounds):
            rates.append(matmul_rate(device, dtype, clock))
            times.append([timed(step) for step in steps])
        speed, textbook = (batch / torch.tensor(times).amin(dim=0)).tolist()
        print(
            f"{name:12} {speed:9.2f} {max(rates) / 1e9:16.1f} {speed * flops / max(rates):6.3f} {textbook:9.2f} "
            f"{textbook / speed:11.3f}",
            flush=True,
        )


def compare_codes(
    device: torch.device, dtype: torch.dtype, *, batch: int, rounds: int, numbers: list[int]
) -> None:
    """Print the table for several codebook sizes."""
    print(f"{'codes':>6} {'seconds':>8} {'to the first':>13} {'peak memory, GiB':>17}")
    steps, memory = [], []
    for codes in numbers:
        model, ids = (
            MTM(**NANO, num_codes=codes).to(device),
            torch.randint(codes, (batch, CROP, CROP), device=device),
        )
        settings = {"get_ids": partial(torch.clone, ids), "update": False, "device": device, "dtype": dtype}
        steps.append(training_step(model, loss=our_loss(model), **settings))
        steps[-1]()
        memory.append(peak_memory(device) / 2**30)
    times = torch.tensor([[timed(step) for step in steps] for _ in range(rounds)]).amin(dim=0).tolist()
    for codes, seconds, peak in zip(numbers, times, memory, strict=True):
        print(f"{codes:6} {seconds:8.2f} {seconds / times[0]:13.2f} {peak:17.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--codes", type=int, nargs="+")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"batch {arguments.batch}, {dtype}, {torch.get_num_threads()} threads")
    if arguments.codes:
        compare_codes(device, dtype, batch=arguments.batch, rounds=arguments.rounds, numbers=arguments.codes)
    else:
        compare_steps(device, dtype, batch=arguments.batch, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
