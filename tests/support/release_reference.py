"""The released checkpoints of SeiT and SeiT++ as plain tensors under their names, and what is computed from them.

Written from the papers and the published layout, without any code of the package.
"""

import math

import torch
from torch import Tensor, nn

WIDTH, DEPTH, DIM, CODES, CLASSES, PATCHES = 128, 2, 6, 17, 5, 16
DECODER_WIDTH, DECODER_DEPTH = 64, 1
Weights = dict[str, Tensor]


# What the papers and the release define, tensor by tensor.


def affine(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def attention(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    parts = affine(w, f"{name}.qkv", x).chunk(3, dim=-1)
    outputs = []
    for q, k, v in zip(*(part.chunk(heads, dim=-1) for part in parts), strict=True):
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        outputs.append(weights @ v)
    return affine(w, f"{name}.proj", torch.cat(outputs, -1))


def transformer(w: Weights, blocks: str, x: Tensor, depth: int, heads: int) -> Tensor:
    for i in range(depth):
        x = x + attention(w, f"{blocks}.{i}.attn", norm(w, f"{blocks}.{i}.norm1", x), heads)
        hidden = gelu(affine(w, f"{blocks}.{i}.mlp.fc1", norm(w, f"{blocks}.{i}.norm2", x)))
        x = x + affine(w, f"{blocks}.{i}.mlp.fc2", hidden)
    return x


def stem(w: Weights, maps: Tensor, stride: int, padding: int) -> Tensor:
    weight, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    windows = torch.nn.functional.unfold(maps, weight.shape[-1], padding=padding, stride=stride)
    return (weight.flatten(1) @ windows).transpose(1, 2) + bias


def classify(w: Weights, patches: Tensor) -> Tensor:
    x = torch.cat([w["cls_token"].expand(len(patches), -1, -1), patches], 1) + w["pos_embed"]
    x = transformer(w, "blocks", x, DEPTH, WIDTH // 64)
    return affine(w, "head", norm(w, "norm", x[:, 1:].mean(1)))


def seit_logits(w: Weights, maps: Tensor, stride: int, padding: int) -> Tensor:
    return classify(w, stem(w, maps, stride, padding))


def id_patches(w: Weights, ids: Tensor) -> Tensor:
    vectors = norm(w, "token_emb.LayerNorm", w["token_emb.word_embeddings.weight"][ids])
    return stem(w, vectors.permute(0, 3, 1, 2), 2, 0)


def seitpp_logits(w: Weights, ids: Tensor) -> Tensor:
    return classify(w, id_patches(w, ids))


def mtm_logits(w: Weights, ids: Tensor, kept: Tensor, hidden: Tensor) -> Tensor:
    """Logits (B, L, 4, K) of the tokens of every patch: image by image, patch by patch."""
    return torch.stack([mtm_image(w, *image) for image in zip(id_patches(w, ids), kept, hidden, strict=True)])


def mtm_image(w: Weights, patches: Tensor, kept: Tensor, hidden: Tensor) -> Tensor:
    positions, cls = w["pos_embed"][0], w["cls_token"][0, 0]
    inputs = [cls + positions[0]]
    for place in kept.tolist():
        content = w["mask_token_label"].flatten() if hidden[place] else patches[place]
        inputs.append(content + positions[1 + place])
    encoded = transformer(w, "blocks", torch.stack(inputs)[None], DEPTH, WIDTH // 64)
    encoded = affine(w, "decoder_embed", norm(w, "norm", encoded))[0]
    seen = {place: vector for place, vector in zip(kept.tolist(), encoded[1:], strict=True) if not hidden[place]}
    decoder_in = torch.stack([encoded[0], *(seen.get(place, encoded[0]) for place in range(PATCHES))])
    decoder_in = decoder_in[None] + w["decoder_pos_embed_learned"]
    decoded = transformer(w, "decoder_blocks", decoder_in, DECODER_DEPTH, DECODER_WIDTH // 32)
    tokens = affine(w, "mlm_layer.fc", norm(w, "decoder_norm", decoded)[0, 1:]).view(PATCHES, 4, DIM)
    tokens = norm(w, "mlm_layer.ln", gelu(tokens))
    return tokens @ w["token_emb.word_embeddings.weight"].T + w["mlm_layer.bias"].flatten()


def mtm_loss(logits: Tensor, ids: Tensor, hidden: Tensor) -> Tensor:
    """Cross-entropy per token, averaged over the tokens of a patch, then over the hidden patches of the batch."""
    losses = []
    for image, grid, mask in zip(logits, ids, hidden, strict=True):
        for place in mask.nonzero().flatten().tolist():
            row, column = 2 * (place // 4), 2 * (place % 4)
            targets = grid[row : row + 2, column : column + 2].flatten()
            losses.append(-image[place].log_softmax(-1)[range(4), targets].mean())
    return torch.stack(losses).mean()


def plain_transformer(tokens: Tensor, w: Weights, prefix: str) -> Tensor:
    """One pre-norm block of heads of 64 and a LayerNorm, matrix by matrix."""
    block = f"{prefix}.layers.0"
    qkv = norm(w, f"{block}.0.norm", tokens, 1e-5) @ w[f"{block}.0.fn.to_qkv.weight"].T
    heads = []
    for q, k, v in zip(*(part.split(64, dim=-1) for part in qkv.chunk(3, dim=-1)), strict=True):
        heads.append((q @ k.transpose(1, 2) / 8).softmax(dim=-1) @ v)
    tokens = tokens + affine(w, f"{block}.0.fn.to_out", torch.cat(heads, dim=-1))
    hidden = affine(w, f"{block}.1.fn.net.0", norm(w, f"{block}.1.norm", tokens, 1e-5)).tanh()
    return norm(w, f"{prefix}.norm", tokens + affine(w, f"{block}.1.fn.net.2", hidden), 1e-5)


def plain_convert(maps: Tensor, w: Weights) -> Tensor:
    """f, token by token."""
    name = "conversion_function"
    batch, _, height, width = maps.shape
    tokens = maps.permute(0, 2, 3, 1).reshape(batch, height * width, -1)
    tokens = tokens @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"] + w[f"{name}.1.de_pos_embedding"]
    tokens = plain_transformer(tokens, w, f"{name}.1.transformer")
    patches = torch.einsum("bnc,cdpq->bndpq", tokens, w[f"{name}.1.to_pixel.1.weight"])
    out = torch.zeros(batch, patches.shape[2], 2 * height, 2 * width)
    for at in range(height * width):
        row, column = divmod(at, width)
        out[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patches[:, at]
    return out + w[f"{name}.1.to_pixel.1.bias"].view(-1, 1, 1)


def plain_invert(maps: Tensor, w: Weights) -> Tensor:
    """g, token by token."""
    name = "reverse_transform"
    weight, tokens = w[f"{name}.0.to_patch_embedding.0.weight"], []
    for row in range(0, maps.shape[2], 2):
        for column in range(0, maps.shape[3], 2):
            patch = maps[:, :, row : row + 2, column : column + 2]
            tokens.append(torch.einsum("bdpq,cdpq->bc", patch, weight))
    tokens = torch.stack(tokens, dim=1) + w[f"{name}.0.to_patch_embedding.0.bias"]
    tokens = plain_transformer(tokens + w[f"{name}.0.en_pos_embedding"], w, f"{name}.0.transformer")
    logits = tokens @ w[f"{name}.1.weight"].T + w[f"{name}.1.bias"]
    return logits.transpose(1, 2).reshape(len(maps), -1, maps.shape[2] // 2, maps.shape[3] // 2)


# Random checkpoints in the released layout.


def shapes_of_blocks(blocks: str, width: int, depth: int) -> dict[str, tuple[int, ...]]:
    parts = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    parts |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    return {f"{blocks}.{i}.{part}": shape for i in range(depth) for part, shape in parts.items()}


def weights(layers: dict[str, tuple[int, ...]], bare: dict[str, tuple[int, ...]]) -> Weights:
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in bare.items()}
    for name, shape in layers.items():
        scale = 0.3 if len(shape) == 1 else 1.0 / torch.tensor(shape[1:]).prod().item() ** 0.5
        state[f"{name}.weight"] = (len(shape) == 1) + scale * torch.randn(shape, generator=generator)
        state[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)
    return state


ENCODER = {**shapes_of_blocks("blocks", WIDTH, DEPTH), "norm": (WIDTH,)}
TOKENS = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + PATCHES, WIDTH)}


def seit_state(kernel: int = 4) -> Weights:
    stem_shape = (WIDTH, DIM, kernel, kernel)
    return weights({**ENCODER, "patch_embed.proj": stem_shape, "head": (CLASSES, WIDTH)}, TOKENS)


IDS_LAYERS = {**ENCODER, "patch_embed.proj": (WIDTH, DIM, 2, 2), "token_emb.LayerNorm": (DIM,)}
IDS_BARE = {**TOKENS, "token_emb.word_embeddings.weight": (CODES, DIM)}


def seitpp_state() -> Weights:
    return weights({**IDS_LAYERS, "head": (CLASSES, WIDTH)}, IDS_BARE)


def sincos(side: int, width: int) -> Tensor:
    """(side^2, width): of every place, row by row, the sines and cosines of its column, then of its row."""
    places = []
    for row in range(side):
        for column in range(side):
            angles = [[at / 10000 ** (4 * i / width) for i in range(width // 4)] for at in (column, row)]
            places.append([f(angle) for part in angles for f in (math.sin, math.cos) for angle in part])
    return torch.tensor(places)


def mtm_state() -> Weights:
    layers = {
        **IDS_LAYERS,
        **shapes_of_blocks("decoder_blocks", DECODER_WIDTH, DECODER_DEPTH),
        "decoder_embed": (DECODER_WIDTH, WIDTH),
        "decoder_norm": (DECODER_WIDTH,),
        "mlm_layer.fc": (4 * DIM, DECODER_WIDTH),
        "mlm_layer.ln": (DIM,),
    }
    bare = {
        **IDS_BARE,
        "mask_token_label": (1, 1, WIDTH),
        "decoder_pos_embed_learned": (1, 1 + PATCHES, DECODER_WIDTH),
        "mlm_layer.bias": (1, 1, CODES),
    }
    unused = torch.cat([torch.zeros(1, DECODER_WIDTH), sincos(4, DECODER_WIDTH)])
    return {**weights(layers, bare), "decoder_pos_embed": unused.unsqueeze(0)}


def published(state: Weights) -> Weights:
    """An MTM or a SeiT++ classifier with its TokenAdapt beside it."""
    return {**state, **tokenadapt_state()}


def tokenadapt_state(
    grid: int = 5, crop: int = 3, codes: int = CODES, dim: int = 4, width: int = 48, heads: int = 2, mlp: int = 40
) -> Weights:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 8

    def transformer(prefix: str) -> dict:
        block = f"{prefix}.layers.0"
        norms = {
            f"{norm}.{part}": draw(width) + (part == "weight")
            for norm in (f"{block}.0.norm", f"{block}.1.norm", f"{prefix}.norm")
            for part in ("weight", "bias")
        }
        return norms | {
            f"{block}.0.fn.to_qkv.weight": draw(3 * heads * 64, width),
            f"{block}.0.fn.to_out.weight": draw(width, heads * 64),
            f"{block}.0.fn.to_out.bias": draw(width),
            f"{block}.1.fn.net.0.weight": draw(mlp, width),
            f"{block}.1.fn.net.0.bias": draw(mlp),
            f"{block}.1.fn.net.2.weight": draw(width, mlp),
            f"{block}.1.fn.net.2.bias": draw(width),
        }

    return {
        "conversion_function.0.weight": draw(width, dim),
        "conversion_function.0.bias": draw(width),
        "conversion_function.1.de_pos_embedding": draw(1, grid * grid, width),
        **transformer("conversion_function.1.transformer"),
        "conversion_function.1.to_pixel.1.weight": draw(width, dim, 2, 2),
        "conversion_function.1.to_pixel.1.bias": draw(dim),
        "reverse_transform.0.en_pos_embedding": draw(1, crop * crop, width),
        "reverse_transform.0.to_patch_embedding.0.weight": draw(width, dim, 2, 2),
        "reverse_transform.0.to_patch_embedding.0.bias": draw(width),
        **transformer("reverse_transform.0.transformer"),
        "reverse_transform.1.weight": draw(codes, width),
        "reverse_transform.1.bias": draw(codes),
    }


def plain_module(state: Weights) -> nn.Module:
    """A module that has a parameter for every tensor of `state`, all zero, and nothing else."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, nn.Parameter(torch.zeros_like(tensor)))
    return root
