"""Adapters against tiny random models of the real library classes: their codes, their reconstructions."""

import pytest
import torch
import torch.nn.functional as F
from support.vqgans import small_vq_model
from torch import Tensor, nn

from seitpp.codebook import full_precision
from seitpp.tokenizers import Tokenizer, TokenizerError, TokenizerSpec, adapters, code_counts
from seitpp.tokenizers.adapters import ChameleonVQ, DiffusersVQ, Emu3VQ, JanusVQ, TamingVQ, TorchScriptVQ

SIZE = 32


def scattered(model: nn.Module, features: Tensor) -> nn.Module:
    """The model with rows near its own features: a random codebook would see one code used."""
    table = model.quantize.embedding.weight
    vectors = features.movedim(-3, -1).reshape(-1, table.shape[1])
    chosen = torch.randint(len(vectors), (len(table),), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        table.copy_(vectors[chosen] + 0.3 * vectors.std() * torch.randn_like(table))
    return model


def to_unit(decoded: Tensor) -> Tensor:
    return (decoded / 2 + 0.5).clamp(0, 1)


def diffusers_model(images: Tensor, **options) -> nn.Module:
    model = small_vq_model(**options)
    return scattered(model, model.encode(images * 2 - 1).latents)


@pytest.mark.parametrize(
    "options", [{}, {"lookup_from_codebook": True}, {"norm_type": "spatial", "latent_channels": 4}]
)
@torch.no_grad()
def test_diffusers_vqmodel(images, options) -> None:
    model = diffusers_model(images, **options)
    tokenizer = DiffusersVQ(model, SIZE)
    latents = model.encode(images * 2 - 1).latents
    quantized, _, (_, _, their_ids) = model.quantize(latents)
    ids = tokenizer.encode(images)
    assert ids.shape == (2, 16, 16) and torch.equal(ids.flatten(), their_ids.flatten())
    assert len(ids.unique()) > 5
    torch.testing.assert_close(tokenizer.codebook[ids].permute(0, 3, 1, 2), quantized)
    torch.testing.assert_close(tokenizer.features(images), latents)
    theirs = model.decode(latents).sample  # quantizes by itself
    torch.testing.assert_close(tokenizer.decode(ids), to_unit(theirs), atol=1e-5, rtol=0)


def transformers_model(name: str, images: Tensor, **options) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, **options}
    return getattr(transformers, name)(getattr(transformers, f"{name}Config")(**size)).eval()


@torch.no_grad()
def test_chameleon(images) -> None:
    options = {"embed_dim": 8, "num_embeddings": 20, "latent_channels": 8, "resolution": SIZE}
    model = transformers_model("ChameleonVQVAE", images, **options)
    pixels = images * 255 * 0.0078 - 1
    scattered(model, model.quant_conv(model.encoder(pixels)))
    theirs = model.encode(pixels)
    tokenizer = ChameleonVQ(model, SIZE)
    ids = tokenizer.encode(images)
    assert ids.shape == (2, 16, 16) and torch.equal(ids.flatten(), theirs.image_tokens.flatten())
    assert len(ids.unique()) > 5
    rows = tokenizer.codebook[ids].permute(0, 3, 1, 2)
    torch.testing.assert_close(rows, theirs.quantized_last_hidden_state)
    with pytest.raises(TokenizerError, match="chameleon_vq tokenizer has no decoder"):
        tokenizer.decode(ids)


@torch.no_grad()
def test_emu3(images) -> None:
    options = {"codebook_size": 20, "attn_resolutions": [1], "hidden_size": 64}
    model = transformers_model("Emu3VQVAE", images, **options)
    tokenizer = Emu3VQ(model, SIZE)
    scattered(model, tokenizer.features(images))
    tokenizer = Emu3VQ(model, SIZE)
    sizes = torch.tensor([[SIZE, SIZE]] * 2)
    theirs = torch.stack(list(model.encode(images * 2 - 1, image_sizes=sizes).image_tokens))
    ids = tokenizer.encode(images)
    assert ids.shape == (2, 16, 16) and torch.equal(ids, theirs) and len(ids.unique()) > 5
    torch.testing.assert_close(tokenizer.codebook[ids], model.quantize.embedding(theirs))
    torch.testing.assert_close(tokenizer.decode(ids), to_unit(model.decode(theirs)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_janus_looks_up_by_direction_as_its_decoder_does(images) -> None:
    options = {"embed_dim": 8, "num_embeddings": 20, "latent_channels": 8, "num_patches": 16}
    model = transformers_model("JanusVQVAE", images, **options)
    features = model.quant_conv(model.encoder(images * 2 - 1))
    scattered(model, features)
    model.quantize.embedding.weight[:10] *= 3  # the library's raw distance passes these over
    tokenizer = JanusVQ(model)
    assert tokenizer.spec.image_size == (SIZE, SIZE) and tokenizer.spec.lookup == "cosine"
    ids = tokenizer.encode(images)
    rows = F.normalize(model.quantize.embedding.weight, dim=1)
    vectors = F.normalize(features, dim=1).permute(0, 2, 3, 1)
    assert torch.equal(ids, (vectors @ rows.T).argmax(dim=-1))
    assert not torch.equal(ids.flatten(), model.encode(images * 2 - 1).image_tokens.flatten())  # its trap
    theirs = model.quantize.get_codebook_entry(ids.flatten(1))
    torch.testing.assert_close(tokenizer.codebook[ids].permute(0, 3, 1, 2), theirs)
    torch.testing.assert_close(tokenizer.decode(ids), to_unit(model.decode(ids.flatten(1))), atol=1e-5, rtol=0)


class Quantize(nn.Module):
    """As in taming-style modules: gives (map, loss, (perplexity, one-hot, flat ids))."""

    def __init__(self, normalized: bool):
        super().__init__()
        self.embedding, self.normalized = nn.Embedding(20, 4), normalized

    def forward(self, z: Tensor) -> tuple:
        vectors, rows = z.permute(0, 2, 3, 1), self.embedding.weight
        if self.normalized:
            vectors, rows = F.normalize(vectors, dim=-1), F.normalize(rows, dim=-1)
        ids = torch.cdist(vectors.flatten(0, 2), rows).argmin(dim=1)
        return rows[ids].view(vectors.shape).permute(0, 3, 1, 2), torch.zeros(()), (None, None, ids)


class Taming(nn.Module):
    def __init__(self, normalized: bool = False):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 4, 4, 4), nn.ConvTranspose2d(4, 3, 4, 4)
        self.quantize = Quantize(normalized)

    def encode(self, x: Tensor) -> tuple:
        return self.quantize(self.encoder(x))

    def decode(self, quantized: Tensor) -> Tensor:
        return self.decoder(quantized)


@pytest.mark.parametrize(("lookup", "normalized"), [("euclidean", False), ("cosine", True)])
@torch.no_grad()
def test_taming_style(images, lookup, normalized) -> None:
    torch.manual_seed(0)
    model = Taming(normalized)
    tokenizer = TamingVQ(model, patch=4, image_size=SIZE, lookup=lookup)
    quantized, _, (_, _, their_ids) = model.encode(images * 2 - 1)
    ids = tokenizer.encode(images)
    assert ids.shape == (2, 8, 8) and torch.equal(ids.flatten(), their_ids) and len(ids.unique()) > 5
    torch.testing.assert_close(tokenizer.codebook[ids].permute(0, 3, 1, 2), quantized)
    torch.testing.assert_close(tokenizer.features(images), quantized)
    torch.testing.assert_close(tokenizer.decode(ids), to_unit(model.decode(quantized)), atol=1e-6, rtol=0)
    with pytest.raises(TokenizerError, match=r"float16 changes ids: call its .float"):
        TamingVQ(model.half(), patch=4, image_size=SIZE).encode(images)


LEVELS = (8, 8, 8, 5, 5, 5)


class FSQEncoder(nn.Module):
    """As the Cosmos encoder: ids int32 and their rows, by finite scalar quantization."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 8, 8)
        self.register_buffer("levels", torch.tensor(LEVELS))
        self.register_buffer("basis", torch.tensor([1, 8, 64, 512, 2560, 12800]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.div(self.levels, 2, rounding_mode="floor").view(-1, 1, 1)
        digits = torch.round(self.conv(x).tanh() * (self.levels.view(-1, 1, 1) - 1) / 2 - 0.25).long() + half
        digits = torch.minimum(digits.clamp(min=0), (self.levels - 1).view(-1, 1, 1))
        ids = (digits * self.basis.view(-1, 1, 1)).sum(dim=1)
        return ids.int(), (digits - half) / half


class FSQDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.ConvTranspose2d(6, 3, 8, 8)
        self.register_buffer("levels", torch.tensor(LEVELS))
        self.register_buffer("basis", torch.tensor([1, 8, 64, 512, 2560, 12800]))

    def forward(self, ids: Tensor) -> Tensor:
        digits = torch.div(ids.unsqueeze(1), self.basis.view(-1, 1, 1), rounding_mode="floor")
        half = torch.div(self.levels, 2, rounding_mode="floor").view(-1, 1, 1)
        return self.conv((digits % self.levels.view(-1, 1, 1) - half) / half)


@torch.no_grad()
def test_torchscript_pair(images, tmp_path) -> None:
    torch.manual_seed(0)
    for name, module in (("encoder", FSQEncoder()), ("decoder", FSQDecoder())):
        torch.jit.script(module).save(tmp_path / f"{name}.jit")
    encoder, decoder = (torch.jit.load(tmp_path / f"{name}.jit") for name in ("encoder", "decoder"))
    tokenizer = TorchScriptVQ(encoder, decoder, patch=8, image_size=SIZE)
    assert tokenizer.codebook.shape == (64000, 6) and len(tokenizer.codebook.unique(dim=0)) == 64000
    their_ids, quantized = encoder(images * 2 - 1)
    ids = tokenizer.encode(images)
    assert ids.dtype == torch.int64 and torch.equal(ids, their_ids.long()) and len(ids.unique()) > 5
    torch.testing.assert_close(tokenizer.codebook[ids].permute(0, 3, 1, 2), quantized)
    assert torch.equal(tokenizer.quantize(tokenizer.features(images)), ids)
    torch.testing.assert_close(tokenizer.decode(ids), to_unit(decoder(their_ids)), atol=1e-6, rtol=0)
    compact = tokenizer.compact(code_counts(ids, 64000))
    torch.testing.assert_close(compact.decode(compact.encode(images)), tokenizer.decode(ids))


BRIGHTNESS = torch.linspace(0, 1, 5).unsqueeze(1)  # five codes, one channel
GRAY = TokenizerSpec("gray", (SIZE, SIZE), patch=4, num_codes=5, code_dim=1, lookup="euclidean")


def gray_ids(images: Tensor) -> Tensor:
    return F.avg_pool2d(images.mean(dim=1), 4).mul(4).round().long().flatten(1)


def gray_images(ids: Tensor) -> Tensor:
    return F.interpolate((ids / 4).unsqueeze(1).expand(-1, 3, -1, -1), scale_factor=4.0, mode="nearest")


def gray() -> Tokenizer:
    return adapters.from_functions(gray_ids, BRIGHTNESS, gray_images, spec=GRAY)


def test_functions_and_their_compact_copy() -> None:
    bright = torch.tensor([0.0, 0.25, 1.0, 1.0]).view(4, 1, 1, 1).expand(4, 3, SIZE, SIZE)
    tokenizer = gray()
    ids = tokenizer.encode(bright)
    assert ids.shape == (4, 8, 8) and ids[:, 0, 0].tolist() == [0, 1, 4, 4]
    torch.testing.assert_close(tokenizer.decode(ids), bright)
    compact = tokenizer.compact(code_counts(ids, 5))
    assert compact.spec.num_codes == 3 and compact.codebook.flatten().tolist() == [1.0, 0.0, 0.25]
    assert compact.encode(bright)[:, 0, 0].tolist() == [1, 2, 0, 0]
    torch.testing.assert_close(compact.decode(compact.encode(bright)), bright)
    unseen = torch.full((1, 3, SIZE, SIZE), 0.75)  # its code was not kept: the nearest kept one is 1.0
    assert compact.encode(unseen).unique().tolist() == [0]
    again = compact.compact(torch.tensor([1, 5, 0]))
    assert again.codebook.flatten().tolist() == [0.0, 1.0] and again.encode(unseen).unique().tolist() == [1]
    assert tokenizer.spec.num_codes == 5 and torch.equal(tokenizer.encode(bright), ids)
    rows = torch.tensor([[0.25 + 2**-20], [1.0]])  # rounded in another way
    chosen = tokenizer.select(rows)
    assert torch.equal(chosen.codebook, rows) and chosen.encode(bright)[:, 0, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(TokenizerError, match=r"1 of 2 rows are not among .*, the farthest 0\.1 away"):
        tokenizer.select(torch.tensor([[0.5], [0.9]]))  # by Euclidean distance, as its lookup


def test_functions_get_the_range_that_the_spec_says() -> None:
    seen = []
    spec = TokenizerSpec(
        "seen", (SIZE, SIZE), 4, num_codes=5, code_dim=1, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0)
    )

    def encode(inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return torch.zeros(len(inputs), 64, dtype=torch.int32)

    def decode(ids: Tensor) -> Tensor:
        return seen[0]

    images = torch.rand(2, 3, SIZE, SIZE)
    tokenizer = adapters.from_functions(encode, BRIGHTNESS, decode, spec=spec)
    restored = tokenizer.decode(tokenizer.encode(images))
    expected = torch.stack([images[:, 0] * 2 - 1, images[:, 1] * 4 - 1, images[:, 2] / 2], dim=1)
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(restored, images)


def test_a_network_that_does_not_fit_is_named(images) -> None:
    def ids_of(result: Tensor) -> Tokenizer:
        return adapters.from_functions(lambda _: result, BRIGHTNESS, spec=GRAY)

    with pytest.raises(TokenizerError, match=r"expected 8 x 8 each: check that its patch is 4"):
        ids_of(torch.zeros(2, 16, 16, dtype=torch.long)).encode(images)
    with pytest.raises(TokenizerError, match="ids 0 to 5 of the gray network, expected 0 to 4"):
        ids_of(torch.arange(128).clamp(max=5)).encode(images)
    with pytest.raises(TokenizerError, match=r"float32 of the gray network: expected integers"):
        ids_of(torch.zeros(2, 64)).encode(images)
    with pytest.raises(TokenizerError, match="gray tokenizer has no decoder"):
        ids_of(torch.zeros(2, 64)).decode(torch.zeros(2, 8, 8, dtype=torch.long))
    with pytest.raises(TokenizerError, match=r"codebook of shape \(4, 1\).*expected \(5, 1\)"):
        adapters.from_functions(gray_ids, BRIGHTNESS[:4], spec=GRAY)
    model = diffusers_model(images)
    model.config["block_out_channels"] = (16,)
    model.register_to_config(block_out_channels=(16,))
    with pytest.raises(TokenizerError, match=r"4 channels on a grid of \(32, 32\): check that its patch is 1"):
        DiffusersVQ(model, SIZE).encode(images)


@torch.no_grad()
def test_lookup_is_fp32_under_autocast_and_in_half_models(images) -> None:
    model = diffusers_model(images)
    tokenizer = DiffusersVQ(model, SIZE)
    ids = tokenizer.encode(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), ids)
    half = DiffusersVQ(diffusers_model(images).bfloat16(), SIZE)
    maps = half.features(images)
    assert maps.dtype == torch.bfloat16
    with full_precision(maps.device):
        exact = torch.cdist(maps.double().permute(0, 2, 3, 1), half.codebook.double()).argmin(dim=-1)
    assert torch.equal(half.encode(images), exact)
    assert half.decode(exact).dtype == torch.float32


def test_any_image_size_when_asked(images) -> None:
    tokenizer = DiffusersVQ(diffusers_model(images), SIZE)
    tokenizer.set_image_size((SIZE, 48))
    wide = tokenizer.preprocess(images)
    ids = tokenizer.encode(wide)
    assert ids.shape == (2, 16, 24) and tokenizer.decode(ids).shape == (2, 3, 32, 48)
    assert tokenizer.description()["spec"]["mean"] == (0.5, 0.5, 0.5)
