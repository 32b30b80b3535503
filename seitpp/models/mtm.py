"""The masked token model of SeiT++: a MAGE-like encoder-decoder around the ViT that is later fine-tuned.

Initial values, all in `MTM.init_weights`:

| parameter                      | law                  | reason                                            |
|--------------------------------|----------------------|---------------------------------------------------|
| linear and stem weights        | Xavier uniform       | as in MAE; the stem is a linear map of a patch    |
| biases, the bias of each code  | 0                    | the first prediction is uniform: loss ln K        |
| LayerNorm                      | weight 1, bias 0     |                                                   |
| code embedding                 | N(0, 0.02)           | SeiT++ release                                    |
| cls token                      | N(0, 0.02)           | as in MAE                                         |
| mask token                     | 0                    | SeiT++ release                                    |
| encoder positions              | sin-cos, not trained | as in MAE; zeros for cls                          |
| decoder positions              | 0                    | SeiT++ release; learned                           |
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import timm
import torch
from einops import rearrange
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from seitpp.models.cross_entropy import linear_cross_entropy
from seitpp.models.masking import MaskPlan
from seitpp.models.stem import ModelError
from seitpp.models.vit import PATCH, NormLayer
from seitpp.tokenizers.transformer import sincos_positions


class MaskedTokens(NamedTuple):
    """How well hidden tokens are predicted: `loss`, their mean cross-entropy in nats, and `accuracy`, the share
    whose most likely code is the true one, both () float32.
    """

    loss: Tensor
    accuracy: Tensor


class MTM(nn.Module):
    """Masked token model. The defaults are the published ViT-B on the published tokens (98.3 M trained).

    `encoder` names a `mtm_vit_*`, `encoder_size` its sizes where they are not those of the name (`embed_dim`,
    `depth`, `num_heads`); `grid` is (H, W) tokens, `num_codes` K, `code_dim` the width of the learned code
    embedding. Raises ModelError if the grid does not divide into patches.
    """

    def __init__(
        self,
        encoder: str = "mtm_vit_base",
        *,
        grid: tuple[int, int] = (28, 28),
        num_codes: int = 391,
        code_dim: int = 32,
        decoder_width: int = 512,
        decoder_depth: int = 4,
        decoder_heads: int = 16,
        dropout: float = 0.1,
        encoder_size: dict[str, int] | None = None,
    ):
        super().__init__()
        given = locals()
        self.settings = {name: given[name] for name in inspect.signature(MTM).parameters}
        if grid[0] % PATCH or grid[1] % PATCH:
            raise ModelError(f"grid {grid[0]} x {grid[1]}: expected sides that are multiples of {PATCH} tokens")
        self.encoder = timm.create_model(
            encoder,
            img_size=grid,
            in_chans=code_dim,
            num_codes=num_codes,
            num_classes=0,
            global_pool="token",
            token_drop_rate=dropout,
            **(encoder_size or {}),
        )
        width, patches = self.encoder.embed_dim, self.encoder.patch_embed.num_patches
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, 1 + patches, decoder_width))
        self.decoder_blocks = nn.Sequential(
            *(
                kind(
                    decoder_width,
                    decoder_heads,
                    qkv_bias=True,
                    proj_drop=dropout,
                    attn_drop=dropout,
                    norm_layer=NormLayer,
                )
                for kind in [Block] * (decoder_depth - 1) + [LastBlock]
            )
        )
        self.decoder_norm = NormLayer(decoder_width)
        self.head = TokenHead(decoder_width, code_dim, num_codes)
        self.grad_checkpointing = False
        self.init_weights()

    def forward(self, ids: Tensor, plan: MaskPlan, targets: Tensor | None = None) -> Tensor | MaskedTokens:
        """Ids (B, H, W) int64 and a plan for their L patches -> logits (B, K, H, W).

        With `targets` (B, H, W) int64, the true ids: `objectives.masked_token_loss` and `masked_token_accuracy` of
        those logits, which are made of hidden tokens only and never all at once. So a model is trained.
        """
        encoded = self.encode(ids, plan)
        table, bias = self.encoder.patch_embed.token_emb.weight.detach(), self.head.bias
        if targets is not None:
            vectors = self.decode(encoded, plan, plan.predicted)
            targets = rearrange(targets, "b (h p) (w q) -> b (h w) (p q)", p=PATCH, q=PATCH)
            targets = _take(targets, plan.predicted)
            return MaskedTokens(*linear_cross_entropy(vectors.flatten(0, 2), table, bias, targets.flatten()))
        everywhere = torch.arange(plan.hidden.shape[1], device=ids.device).expand_as(plan.hidden)
        rows = self.encoder.patch_embed.grid_size[0]
        vectors = self.decode(encoded, plan, everywhere)
        vectors = rearrange(vectors, "b (h w) (p q) d -> b (h p) (w q) d", h=rows, p=PATCH)
        return (vectors @ table.T + bias).permute(0, 3, 1, 2)

    def encode(self, ids: Tensor, plan: MaskPlan) -> Tensor:
        """Only the kept patches go through the blocks: (B, H, W) -> (B, 1 + kept, C), cls first.

        A kept patch that is hidden enters as mask token + position: its content is never seen.
        """
        encoder = self.encoder
        patches = encoder.patch_embed(ids)
        patches = torch.where(plan.hidden.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        patches = _take(patches + encoder.pos_embed[:, 1:], plan.kept)
        cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(patches), -1, -1)
        return encoder.norm(self._through(encoder.blocks, torch.cat([cls, patches], dim=1)))

    def decode(self, encoded: Tensor, plan: MaskPlan, places: Tensor) -> Tensor:
        """(B, 1 + kept, C) and the patches asked for (B, n) int64 -> a vector for each token (B, n, 4, D).

        Every hidden place holds the projected cls output.
        """
        encoded = self.decoder_embed(encoded)
        cls, kept = encoded[:, :1], encoded[:, 1:]
        patches = cls.expand(-1, plan.hidden.shape[1], -1)
        patches = patches.scatter(1, plan.kept.unsqueeze(-1).expand_as(kept), kept)
        patches = torch.where(plan.hidden.unsqueeze(-1), cls, patches)
        *blocks, last = self.decoder_blocks
        blocks = [*blocks, partial(last, places=1 + places)]
        decoded = self._through(blocks, torch.cat([cls, patches], dim=1) + self.decoder_pos_embed)
        return self.head(self.decoder_norm(decoded))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the input of each block only, and compute the rest again in the backward pass (as in timm)."""
        self.grad_checkpointing = enable

    def _through(self, blocks: Iterable[Callable[[Tensor], Tensor]], tokens: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return checkpoint_seq(list(blocks), tokens)
        for block in blocks:
            tokens = block(tokens)
        return tokens

    @torch.no_grad()
    def init_weights(self) -> None:
        """See the table at the top of this file."""
        self.apply(_init_module)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        for learned in (self.mask_token, self.decoder_pos_embed):
            nn.init.zeros_(learned)
        positions = self.encoder.pos_embed
        positions.zero_()
        positions[0, 1:] = sincos_positions(self.encoder.patch_embed.grid_size, positions.shape[-1])
        positions.requires_grad_(False)


class LastBlock(Block):
    """A block that all tokens enter and some leave: past its attention nothing is computed for the others."""

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        """(B, N, C), places (B, n) int64 -> (B, n, C)."""
        tokens = _take(tokens + self.attn(self.norm1(tokens)), places)
        return tokens + self.mlp(self.norm2(tokens))


class TokenHead(nn.Module):
    """Patches -> a vector for each of their tokens; `bias` is that of their logits against the embedding table."""

    def __init__(self, width: int, dim: int, codes: int):
        super().__init__()
        self.fc = nn.Linear(width, PATCH * PATCH * dim)
        self.act = nn.GELU()
        self.norm = NormLayer(dim)
        self.bias = nn.Parameter(torch.zeros(codes))

    def forward(self, patches: Tensor) -> Tensor:
        """(B, L, width) -> (B, L, 4, dim), tokens row by row."""
        return self.norm(self.act(self.fc(patches).unflatten(2, (PATCH * PATCH, -1))))


def _take(patches: Tensor, indices: Tensor) -> Tensor:
    return patches.gather(1, indices.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, TokenHead):
        nn.init.zeros_(module.bias)
