"""The masked token model of SeiT++: a MAGE-like encoder-decoder around the ViT that is later fine-tuned.

Initial values, all in `MTM.init_weights`:

| parameter                      | distribution         | reason                                            |
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
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import timm
import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from seitpp.augment.maps import both_sides
from seitpp.models.cross_entropy import linear_cross_entropy
from seitpp.models.masking import MaskPlan
from seitpp.models.stem import ModelError
from seitpp.models.vit import PATCH, NormLayer, digit_sizes
from seitpp.tokenizers.transformer import init_xavier, sincos_positions


class MaskedTokens(NamedTuple):
    """How well the hidden tokens are predicted.

    `loss` is their mean cross-entropy in nats, `accuracy` the fraction whose most likely code is the true one.
    """

    loss: Float32[Tensor, ""]
    accuracy: Float32[Tensor, ""]


class MTM(nn.Module):
    """The masked token model of SeiT++. The defaults are the published ViT-B (98.3 M trained parameters).

    `encoder` is the timm name of a `mtm_vit_*`; `encoder_size` overrides its `embed_dim`, `depth` or `num_heads`.
    `grid` is (H, W) in tokens, `num_codes` the size of the codebook, or the number of values of each digit of a
    token, `code_dim` the width of the learned code embedding, `patch_size` the tokens of a patch along one side or
    (down, across). The digits of a token are predicted each by itself. Raises ModelError if the grid does not
    divide into patches.
    """

    def __init__(
        self,
        encoder: str = "mtm_vit_base",
        *,
        grid: tuple[int, int] = (28, 28),
        num_codes: int | Sequence[int] = 391,
        code_dim: int = 32,
        patch_size: int | tuple[int, int] = PATCH,
        decoder_width: int = 512,
        decoder_depth: int = 4,
        decoder_heads: int = 16,
        dropout: float = 0.1,
        encoder_size: dict[str, int] | None = None,
    ):
        super().__init__()
        arguments = locals()
        self.settings = {name: arguments[name] for name in inspect.signature(MTM).parameters}
        if patch_size == PATCH:  # as in the files of before it could be chosen
            del self.settings["patch_size"]
        self.patch, self.sizes = both_sides(patch_size), digit_sizes(num_codes)
        if grid[0] % self.patch[0] or grid[1] % self.patch[1]:
            raise ModelError(
                f"masked token model: got a grid of {grid[0]} x {grid[1]} tokens, expected multiples of "
                f"{self.patch[0]} x {self.patch[1]}, a patch"
            )
        self.encoder = timm.create_model(
            encoder,
            img_size=grid,
            in_chans=code_dim,
            num_codes=num_codes,
            patch_size=self.patch,
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
                block(
                    decoder_width,
                    decoder_heads,
                    qkv_bias=True,
                    proj_drop=dropout,
                    attn_drop=dropout,
                    norm_layer=NormLayer,
                )
                for block in [Block] * (decoder_depth - 1) + [LastBlock]
            )
        )
        self.decoder_norm = NormLayer(decoder_width)
        self.head = TokenHead(decoder_width, code_dim, patch=self.patch, sizes=self.sizes)
        self.grad_checkpointing = False
        self.init_weights()

    def forward(
        self,
        ids: Int64[Tensor, "batch *digits height width"],
        plan: MaskPlan,
        targets: Int64[Tensor, "batch *digits height width"] | None = None,
    ) -> Float[Tensor, "batch codes height width"] | MaskedTokens:
        """Predict the logits of all tokens, or with `targets` the loss and accuracy of the hidden tokens.

        Training passes `targets`, the true ids. The loss and accuracy are those of `objectives.masked_token_loss`
        and `masked_token_accuracy`, but only the logits of hidden tokens are computed, and never all at once. Of
        tokens with several digits, the logits of digit 0 come first, then those of digit 1, and so on.
        """
        encoded = self.encode(ids, plan)
        if targets is not None:
            vectors = self.decode(encoded, plan, plan.predicted)
            return self._masked_tokens(vectors.unflatten(2, (-1, len(self.sizes))), targets, plan)
        all_patches = torch.arange(plan.hidden.shape[1], device=ids.device).expand_as(plan.hidden)
        rows = self.encoder.patch_embed.grid_size[0]
        vectors = self.decode(encoded, plan, all_patches)
        vectors = rearrange(
            vectors, "b (h w) (p q n) d -> b n (h p) (w q) d", h=rows, p=self.patch[0], q=self.patch[1]
        )
        logits = [
            plane @ table.T + bias for plane, (table, bias) in zip(vectors.unbind(1), self._tables(), strict=True)
        ]
        return torch.cat(logits, dim=3).permute(0, 3, 1, 2) if len(logits) > 1 else logits[0].permute(0, 3, 1, 2)

    def _masked_tokens(self, vectors: Tensor, targets: Tensor, plan: MaskPlan) -> MaskedTokens:
        """Score the vectors (B, predicted, tokens of a patch, Q, D) of the hidden tokens."""
        planes = targets if targets.ndim == 4 else targets.unsqueeze(1)
        planes = rearrange(planes, "b n (h p) (w q) -> n b (h w) (p q)", p=self.patch[0], q=self.patch[1])
        parts = [
            linear_cross_entropy(
                vectors[..., digit, :].flatten(0, 2), table, bias, targets=_gather(plane, plan.predicted).flatten()
            )
            for digit, (plane, (table, bias)) in enumerate(zip(planes, self._tables(), strict=True))
        ]
        loss, accuracy = (sum(one) / len(parts) for one in zip(*parts, strict=True))
        return MaskedTokens(loss, accuracy)

    def _tables(self) -> list[tuple[Tensor, Tensor]]:
        """The embedding table and the bias of each digit."""
        table, bias = self.encoder.patch_embed.token_emb.weight.detach(), self.head.bias
        return list(zip(table.split(self.sizes), bias.split(self.sizes), strict=True))

    def encode(
        self, ids: Int64[Tensor, "batch *digits height width"], plan: MaskPlan
    ) -> Float[Tensor, "batch cls_and_kept channels"]:
        """Encode the kept patches, with the cls token first.

        A kept patch that is hidden enters as the mask token plus its position, so its content is never seen.
        """
        encoder = self.encoder
        patches = encoder.patch_embed(ids)
        patches = torch.where(plan.hidden.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        patches = _gather(patches + encoder.pos_embed[:, 1:], plan.kept)
        cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(patches), -1, -1)
        return encoder.norm(self._run(encoder.blocks, torch.cat([cls, patches], dim=1)))

    def decode(
        self,
        encoded: Float[Tensor, "batch cls_and_kept channels"],
        plan: MaskPlan,
        indices: Int64[Tensor, "batch predicted"],
    ) -> Float[Tensor, "batch predicted digits_of_tokens dim"]:
        """Decode the output of `encode` to a vector for each digit of each token of the patches `indices`.

        The input of the decoder at a hidden patch is the projected cls output.
        """
        encoded = self.decoder_embed(encoded)
        cls, kept = encoded[:, :1], encoded[:, 1:]
        patches = cls.expand(-1, plan.hidden.shape[1], -1)
        patches = patches.scatter(1, plan.kept.unsqueeze(-1).expand_as(kept), kept)
        patches = torch.where(plan.hidden.unsqueeze(-1), cls, patches)
        *blocks, last = self.decoder_blocks
        blocks = [*blocks, partial(last, indices=1 + indices)]
        decoded = self._run(blocks, torch.cat([cls, patches], dim=1) + self.decoder_pos_embed)
        return self.head(self.decoder_norm(decoded))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store only the input of each block and recompute the rest in the backward pass, as in timm."""
        self.grad_checkpointing = enable

    def _run(self, blocks: Iterable[Callable[[Tensor], Tensor]], tokens: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return checkpoint_seq(list(blocks), tokens)
        for block in blocks:
            tokens = block(tokens)
        return tokens

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the initial values of the table at the top of this file."""
        self.apply(_init_module)
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        for learned in (self.mask_token, self.decoder_pos_embed):
            nn.init.zeros_(learned)
        positions = self.encoder.pos_embed
        positions.zero_()
        positions[0, 1:] = sincos_positions(self.encoder.patch_embed.grid_size, positions.shape[-1])
        positions.requires_grad_(False)


class LastBlock(Block):
    """A transformer block that returns some of its tokens; after the attention the others are not computed."""

    def forward(
        self, tokens: Float[Tensor, "batch tokens channels"], indices: Int64[Tensor, "batch chosen"]
    ) -> Float[Tensor, "batch chosen channels"]:
        """Return the outputs of the tokens `indices`; all tokens take part in the attention."""
        tokens = _gather(tokens + self.attn(self.norm1(tokens)), indices)
        return tokens + self.mlp(self.norm2(tokens))


class TokenHead(nn.Module):
    """The head that maps each patch to one vector for each digit of each token, tokens row by row.

    `bias` is that of the logits, which MTM computes as products of these vectors with the embedding table.
    """

    def __init__(self, width: int, dim: int, *, patch: tuple[int, int], sizes: Sequence[int]):
        super().__init__()
        self.vectors = patch[0] * patch[1] * len(sizes)
        self.fc = nn.Linear(width, self.vectors * dim)
        self.act = nn.GELU()
        self.norm = NormLayer(dim)
        self.bias = nn.Parameter(torch.zeros(sum(sizes)))

    def forward(self, patches: Float[Tensor, "batch patches width"]) -> Float[Tensor, "batch patches vectors dim"]:
        return self.norm(self.act(self.fc(patches).unflatten(2, (self.vectors, -1))))


def _gather(patches: Tensor, indices: Tensor) -> Tensor:
    return patches.gather(1, indices.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def _init_module(module: nn.Module) -> None:
    init_xavier(module)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, TokenHead):
        nn.init.zeros_(module.bias)
