"""Tokens of several digits, and sequences: quantizers of others, views, models, tokenizers."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import vector_quantize_pytorch as vq
from support.running import call, recipe
from torch import Tensor

from seitpp import StoreWriter
from seitpp.augment import EvalView, Keys, SeitPPFinetuneView, SeitPPView, SeitView
from seitpp.augment.ids import TokenEDA
from seitpp.books import Books
from seitpp.codebook import Codebook, codebook_fingerprint, nearest
from seitpp.errors import UserError
from seitpp.models import MTM, TokenAdapt, classifier_from
from seitpp.models.masking import likeliest, mask_plan
from seitpp.models.weights.classifiers import load_classifier, save_classifier
from seitpp.models.weights.pretrained import load_mtm, load_tokenadapt, save_pretrained
from seitpp.objectives import masked_token_accuracy, masked_token_loss
from seitpp.tokenizers import Tokenizer, TokenizerError, TokenizerSpec
from seitpp.tokenizers.adapters import binary_books, from_functions, fsq_books, fsq_codebook

GRID = (8, 8)


def random_tables(*shapes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


BOOKS = {
    "index": Books.of(random_tables((66_000, 3))[0]),
    "concat": Books.join(random_tables((16, 2), (7, 3)), "concat"),
    "sum": Books.join(random_tables((16, 4), (9, 4), (5, 4)), "sum"),
}
SEVERAL = pytest.mark.parametrize("books", BOOKS.values(), ids=BOOKS)


def random_ids(books: Books, n: int = 8, grid: tuple[int, int] = GRID) -> Tensor:
    """Ids (n, Q, H, W) of random codes."""
    if books.combine == "index":
        return Codebook.of(books).split(torch.randint(books.rows, (n, *grid)))
    return torch.stack([torch.randint(size, (n, *grid)) for size in books.sizes], dim=1)


def keys(n: int = 8) -> Keys:
    return Keys(0, 0, torch.arange(n))


# Lookups


@SEVERAL
def test_vectors_are_made_of_the_rows_and_found_again(books: Books) -> None:
    torch.manual_seed(0)
    ids, codebook = random_ids(books), Codebook.of(books)
    rows = [torch.from_numpy(table) for table in books.tables]
    if books.combine == "index":
        expected = rows[0][ids[:, 0] * books.sizes[1] + ids[:, 1]]
    else:
        parts = [table[ids[:, digit]] for digit, table in enumerate(rows)]
        expected = torch.cat(parts, dim=-1) if books.combine == "concat" else sum(parts)
    maps = codebook.embed(ids)
    assert torch.equal(maps, expected.permute(0, 3, 1, 2)) and maps.shape[1] == codebook.dim == books.dim
    if books.combine == "sum":  # residual quantizers do not find every sum again, but the same digits each time
        rest, digits = maps, []
        for table in rows:
            digits.append(nearest(rest, table, "euclidean"))
            rest = rest - table[digits[-1]].permute(0, 3, 1, 2)
        assert torch.equal(codebook.nearest(maps, "euclidean"), torch.stack(digits, dim=1))
    else:
        assert torch.equal(codebook.nearest(maps, "euclidean"), ids)


def test_digits_of_no_code_are_those_of_the_last_one() -> None:
    books, codebook = BOOKS["index"], Codebook.of(BOOKS["index"])
    ids = torch.tensor([size - 1 for size in books.sizes]).view(1, 2, 1, 1)
    assert (books.sizes[0] - 1) * books.sizes[1] + books.sizes[1] - 1 >= books.rows
    assert torch.equal(codebook.embed(ids).flatten(), torch.from_numpy(books.tables[0][-1]))


def test_fingerprints_tell_books_apart() -> None:
    tables = random_tables((6, 2), (6, 2))
    books = [Books.join(tables, "sum"), Books.join(tables, "concat"), Books.join(tables[::-1], "sum")]
    assert len({codebook_fingerprint(one) for one in [*books, tables[0]]}) == 4
    assert codebook_fingerprint(tables[0]) == codebook_fingerprint(Books.of(tables[0]))
    assert codebook_fingerprint(Codebook.of(books[0]).to_books()) == codebook_fingerprint(books[0])


# Quantizers of vector-quantize-pytorch: their ids and their vectors


def test_a_residual_quantizer_of_another_library() -> None:
    torch.manual_seed(0)
    quantizer = vq.ResidualVQ(dim=8, codebook_size=32, num_quantizers=4, kmeans_init=True, kmeans_iters=4)
    vectors = torch.randn(4, 64, 8)
    quantizer.train()(vectors)
    quantized, ids, _ = quantizer.eval()(vectors)
    books = Books.join(list(quantizer.codebooks.detach().numpy()), "sum")
    planes = ids.permute(0, 2, 1).unflatten(2, (8, 8))
    embedded = Codebook.of(books).embed(planes)
    torch.testing.assert_close(embedded, quantized.transpose(1, 2).unflatten(2, (8, 8)))
    maps = vectors.transpose(1, 2).unflatten(2, (8, 8))
    assert torch.equal(Codebook.of(books).nearest(maps, "euclidean"), planes)


def test_quantizers_without_a_stored_codebook() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 18, 4, 4)
    _, ids, _ = vq.LFQ(codebook_size=2**18, dim=18).eval()(maps)
    books = binary_books(18, digits=2)
    assert books.sizes == (512, 512)
    planes = torch.stack([ids // 512, ids % 512], dim=1)
    assert torch.equal(Codebook.of(books).nearest(maps, "euclidean"), planes)
    assert torch.equal(Codebook.of(books).embed(planes), maps.sign())
    levels = (8, 5, 5, 5)
    fsq = vq.FSQ(list(levels)).eval()
    quantized, ids = fsq(torch.randn(2, 4, 4, 4))
    digits = Codebook.of(fsq_books(levels)).nearest(quantized, "euclidean")
    weights = torch.tensor([1, 8, 40, 200]).view(1, 4, 1, 1)
    assert torch.equal((digits * weights).sum(dim=1), ids.long())
    assert torch.equal(
        Codebook.of(fsq_books(levels)).embed(digits), fsq_codebook(levels)[ids.long()].permute(0, 3, 1, 2)
    )
    with pytest.raises(TokenizerError, match="equal digits"):
        binary_books(18, digits=4)


# Views


@SEVERAL
def test_views_give_digits_or_their_vectors(books: Books) -> None:
    torch.manual_seed(0)
    ids, labels, codebook = random_ids(books), torch.arange(8), Codebook.of(books)
    cropped = SeitPPView(books, size=6, tokenadapt_fraction=0.0, lookup="euclidean")(ids, keys())
    assert cropped.shape == (8, books.digits, 6, 6)
    assert all((cropped[:, digit] < size).all() for digit, size in enumerate(books.sizes))
    assert torch.equal(SeitPPView(books, size=None, tokenadapt_fraction=0.0)(ids, keys()), ids)
    view = SeitPPFinetuneView(books, size=6, tokenadapt_fraction=0.0, lookup="euclidean")
    assert view(ids, labels, keys())[0].shape == (8, books.digits, 6, 6)
    maps, _ = SeitView(books, size=8, crop=None, eda=None, color=None, cutmix=0.0)(ids, labels, keys())
    assert torch.equal(maps, codebook.embed(ids))
    colored, _ = SeitView(books, size=6, eda=None, color="seitpp")(ids, labels, keys())
    assert colored.shape == (8, books.dim, 6, 6) and colored.isfinite().all()
    assert torch.equal(EvalView((6, 4))(ids), ids[..., 1:7, 2:6])
    assert torch.equal(EvalView((6, 4), books)(ids), codebook.embed(ids[..., 1:7, 2:6]))


@pytest.mark.parametrize("name", ["concat", "sum"])
def test_synonyms_of_each_digit(name: str) -> None:
    torch.manual_seed(0)
    books, ids = BOOKS[name], random_ids(BOOKS[name])
    eda = TokenEDA(books, "paper")
    replaced = eda._replaced(ids, keys())
    changed = (replaced != ids).flatten(2)
    assert 0.15 < changed.float().mean() < 0.35
    assert torch.equal(changed.any(dim=1), changed.all(dim=1)), "all digits of a token, or none"
    table = torch.from_numpy(books.tables[1])
    distances = torch.cdist(table, table).fill_diagonal_(torch.inf)
    near = distances.topk(min(5, len(table) - 1), largest=False).indices
    where = changed[:, 1].unflatten(1, GRID)
    assert (near[ids[:, 1][where]] == replaced[:, 1][where].unsqueeze(1)).any(dim=1).all()
    swapped = eda(ids, keys())
    assert swapped.shape == ids.shape


# Models


@SEVERAL
@pytest.mark.parametrize("patch", [1, 2])
def test_a_masked_model_predicts_each_digit(books: Books, patch: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    decoder = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "dropout": 0.0}
    model = MTM(
        "mtm_vit_nano",
        grid=GRID,
        num_codes=books.num_codes,
        code_dim=4,
        patch_size=patch,
        **decoder,
        encoder_size=size,
    )
    patches, ids = (8 // patch) ** 2, random_ids(books, 4)
    plan = mask_plan(torch.rand(4, patches), patches // 4, patches // 2)
    logits = model(ids, plan)
    assert logits.shape == (4, sum(books.sizes), *GRID)
    loss, accuracy = model(ids, plan, targets=ids)
    torch.testing.assert_close(loss, masked_token_loss(logits, ids, plan, sizes=books.sizes))
    torch.testing.assert_close(accuracy, masked_token_accuracy(logits, ids, plan, sizes=books.sizes))
    by_hand = [
        F.cross_entropy(part, plane)
        for part, plane in zip(logits.split(books.sizes, dim=1), ids.unbind(1), strict=True)
    ]
    everything = mask_plan(torch.rand(4, patches), 0, patches)
    torch.testing.assert_close(
        masked_token_loss(logits, ids, everything, sizes=books.sizes), torch.stack(by_hand).mean()
    )
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if p.requires_grad
    )
    hidden = plan.hidden.view(4, 8 // patch, 8 // patch).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    other = torch.where(hidden.unsqueeze(1), random_ids(books, 4), ids)
    assert torch.equal(model(other, plan), logits), "hidden tokens are not seen"
    save_pretrained(tmp_path / "mtm.safetensors", model, "abc")
    loaded = load_mtm(tmp_path / "mtm.safetensors").model
    assert torch.equal(loaded(ids, plan), model.eval()(ids, plan)) and loaded.sizes == books.sizes
    classifier = classifier_from(loaded, 3, img_size=(6, 6)).eval()
    save_classifier(tmp_path / "classifier.safetensors", classifier, "abc", class_names=None)
    again = load_classifier(tmp_path / "classifier.safetensors").model
    assert torch.equal(again(ids[..., :6, :6]), classifier(ids[..., :6, :6]))


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    model = MTM("mtm_vit_nano", grid=GRID, num_codes=(16, 7), code_dim=8, decoder_width=48, decoder_heads=4)
    patches, ids = 16, random_ids(BOOKS["concat"], 4)
    plan = mask_plan(torch.rand(4, patches), 4, 8)
    loss = model.eval()(ids, plan, targets=ids).loss
    assert abs(loss - (np.log(16) + np.log(7)) / 2) < 0.1


@SEVERAL
def test_tokenadapt_predicts_each_digit(books: Books, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapt = TokenAdapt(
        GRID, crop=(6, 6), num_codes=books.num_codes, code_dim=books.dim, width=16, heads=1, mlp=16
    ).eval()
    with torch.no_grad():
        adapt.head.weight.normal_()
    ids = random_ids(books)
    space = adapt.convert(Codebook.of(books).embed(ids))[..., :12, :12]
    assert torch.equal(adapt.likeliest(space), likeliest(adapt.invert(space), books.sizes))
    view = SeitPPView(books, size=6, adapt=adapt, tokenadapt_fraction=0.5, lookup="euclidean")
    adapted = view(ids, keys())
    assert adapted.shape == (8, books.digits, 6, 6)
    maps, _ = SeitView(books, size=6, eda=None, color=None, adapt=adapt, tokenadapt_fraction=0.5)(
        ids, torch.arange(8), keys()
    )
    assert maps.shape == (8, books.dim, 6, 6)
    save_pretrained(tmp_path / "adapt.safetensors", adapt, "abc")
    assert load_tokenadapt(tmp_path / "adapt.safetensors").model.sizes == books.sizes


# Tokenizers


def halves(sequence: int = 0) -> Tokenizer:
    """A tokenizer of two digits: the mean of each half of the colors of a patch, in 4 and 3 levels."""
    tables = [np.linspace(0, 1, 4)[:, None], np.linspace(0, 1, 3)[:, None]]
    spec = TokenizerSpec(
        "halves",
        (16, 16),
        4,
        num_codes=7,
        code_dim=2,
        lookup="euclidean",
        digits=(4, 3),
        combine="concat",
        sequence=sequence,
    )

    def encode(images: Tensor) -> Tensor:
        means = F.avg_pool2d(images, 4)
        digits = [(means[:, 0] * 3).round().long(), (means[:, 1] * 2).round().long()]
        planes = torch.stack(digits, dim=1)
        return planes.flatten(2) if sequence else planes

    def decode(ids: Tensor) -> Tensor:
        planes = ids.view(len(ids), 2, 4, 4).float()
        colors = torch.stack([planes[:, 0] / 3, planes[:, 1] / 2, planes[:, 0] * 0], dim=1)
        return F.interpolate(colors, scale_factor=4)

    return from_functions(encode, Books.join(tables, "concat"), decode, spec=spec)


@pytest.mark.parametrize("sequence", [0, 16])
def test_a_tokenizer_of_digits(sequence: int) -> None:
    tokenizer, images = halves(sequence), torch.rand(3, 3, 16, 16)
    ids = tokenizer.encode(images)
    assert ids.shape == ((3, 2, 1, 16) if sequence else (3, 2, 4, 4)) and tokenizer.spec.grid == ids.shape[2:]
    assert torch.equal(tokenizer.quantize(tokenizer.features(images)), ids)
    assert torch.equal(tokenizer.encode(tokenizer.decode(ids)), ids)
    assert TokenizerSpec.from_json(tokenizer.spec.to_json()) == tokenizer.spec
    with pytest.raises(TokenizerError, match="ids 3 to 3 of the halves tokenizer, expected 0 to 2"):
        tokenizer.decode(ids.flip(1).clamp(min=0).index_fill(1, torch.tensor([1]), 3))
    with pytest.raises(TokenizerError, match=r"got ids of shape .*, expected \(B, 2, H, W\)"):
        tokenizer.decode(ids[:, 0])
    with pytest.raises(TokenizerError, match="a code is the rows of 2 tables"):
        tokenizer.compact(torch.ones(7))


@pytest.mark.parametrize(
    "change", [{"digits": (7,)}, {"digits": (4, 4)}, {"combine": "index"}, {"digits": ()}, {"sequence": -1}]
)
def test_specs_of_no_tokenizer_are_refused(change: dict) -> None:
    with pytest.raises(TokenizerError, match="got digits"):
        TokenizerSpec.from_json(halves().spec.to_json() | change)


def test_a_codebook_of_more_codes_than_16_bits_hold() -> None:
    table = torch.from_numpy(BOOKS["index"].tables[0])
    spec = TokenizerSpec("large", (16, 16), 4, num_codes=len(table), code_dim=3)
    chosen = torch.randint(len(table), (2, 4, 4))
    tokenizer = from_functions(lambda _: chosen, table, spec=spec)
    ids = tokenizer.encode(torch.rand(2, 3, 16, 16))
    assert torch.equal(ids[:, 0] * BOOKS["index"].sizes[1] + ids[:, 1], chosen)
    assert tokenizer.compact(torch.bincount(chosen.flatten(), minlength=len(table))).encode(
        torch.rand(2, 3, 16, 16)
    ).shape == (2, 4, 4)


@pytest.mark.parametrize(
    ("name", "flags"),
    [("seit_train", ["--flip", 0.5, "--crop-mode", "None"]), ("mtm_pretrain", ["--crop-size", 4])],
)
def test_sequences_are_neither_cropped_nor_flipped(name: str, flags: list, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        table = BOOKS["concat"].tables[0]
        with StoreWriter(tmp_path / "s", codebook=table, grid=(1, 9), layout="sequence", split=split) as writer:
            writer.add_batch(np.zeros((4, 1, 9), int), [0, 1, 0, 1])
    line = ["smoke", "--store", tmp_path / "s", "--out", tmp_path / "run", "--batch-size", 4, *flags]
    with pytest.raises(UserError, match=f"^{flags[0]} {flags[1]}: the tokens of .* are sequences"):
        call(recipe(name), *line)
