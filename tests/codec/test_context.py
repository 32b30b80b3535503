"""The codec "context": smaller than any static table, exact, and refused when damaged."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_sample_images
from support import codec_reference as reference
from support.paths import GOLDEN

from seitpp import TokenStore
from seitpp import codec as codecs
from seitpp.codec import CodecError, ContextCodec
from seitpp.data.digits import digits
from seitpp.tokenizers import PatchKMeans


def smooth_grids(num_images: int, height: int, width: int, num_codes: int, seed: int = 0) -> np.ndarray:
    """(N, H, W) ids like those of images: neighbors are alike. Integers only, so the same on every machine."""
    rng = np.random.default_rng(seed)
    walk = rng.integers(-2, 3, (num_images, height, 1)).cumsum(axis=1) + rng.integers(
        -2, 3, (num_images, 1, width)
    )
    return (walk + rng.integers(0, num_codes, (num_images, 1, 1))) % num_codes


def circle(num_codes: int) -> np.ndarray:
    """(K, 2) codebook in which codes with near ids are near."""
    angle = 2 * np.pi * np.arange(num_codes) / num_codes
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def learned(height: int, width: int, num_codes: int, num_images: int = 30) -> ContextCodec:
    return ContextCodec.learn(smooth_grids(num_images, height, width, num_codes), circle(num_codes))


@pytest.fixture(scope="module")
def photographs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grids (N, 32, 32) of the left and (M, 32, 32) of the right half of two photographs, and the codebook.

    Tokenizer and tables know the left halves only.
    """
    images = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]

    def crops(halves: list[torch.Tensor], step: int) -> torch.Tensor:
        tiles = [half.unfold(1, 128, step).unfold(2, 128, step).flatten(1, 2) for half in halves]
        return torch.cat(tiles, dim=1).transpose(0, 1).contiguous()

    left, right = (
        crops([image[..., :320] for image in images], 22),
        crops([image[..., 320:] for image in images], 64),
    )
    tokenizer = PatchKMeans.fit(left[::16], image_size=128, patch=4, num_codes=391, code_dim=32)
    return tokenizer.encode(left).numpy(), tokenizer.encode(right).numpy(), tokenizer.codebook.numpy()


def sizes(learn: np.ndarray, grids: np.ndarray, codebook: np.ndarray) -> tuple[float, float]:
    """Mean payload of `grids` in bytes, with the static table and with the context tables learned from `learn`.

    The context tables' own bytes, spread over 100,000 images, are counted.
    """
    num_codes = len(codebook)
    static = codecs.build("ans", num_codes, np.bincount(learn.ravel(), minlength=num_codes))
    context = ContextCodec.learn(learn, codebook)
    total = [0, 0]
    for ids in grids.reshape(len(grids), -1):
        payload = context.encode(ids)
        assert (context.decode(payload, ids.size) == ids).all()
        total[0] += len(static.encode(ids))
        total[1] += len(payload)
    return total[0] / len(grids), total[1] / len(grids) + len(context.table) / 100_000


def test_a_fifth_smaller_than_the_static_table_on_unseen_photographs(photographs):
    static, context = sizes(*photographs)
    assert context <= 0.8 * static


def test_a_fifth_smaller_than_the_static_table_on_unseen_digits():
    train, validation = (TokenStore(digits().store, split) for split in ("train", "validation"))
    grids = [store.ids(range(len(store))).astype(np.int64) for store in (train, validation)]
    static, context = sizes(*grids, train.codebook)
    assert context <= 0.8 * static


GRIDS = [(1, 1), (1, 2), (2, 1), (1, 9), (17, 1), (3, 5), (8, 8), (9, 13), (16, 4)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("num_codes", [1, 2, 40])
def test_bytes_agree_with_the_reference_and_decode(grid, num_codes):
    codec = learned(*grid, num_codes)
    noise = np.random.default_rng(3).integers(0, num_codes, (2, *grid))
    # Noise: codes that no context table and no count has seen.
    for ids in np.concatenate([smooth_grids(3, *grid, num_codes, seed=1), noise]).reshape(5, -1):
        body = reference.context_body(codec.table, grid, ids.tolist())
        table = reference.u32(grid[0]) + reference.u32(grid[1]) + codec.table
        payload = codec.encode(ids)
        assert payload == reference.check(table, ids.size, body) + body
        decoded = codec.decode(payload, ids.size)
        assert decoded.dtype == np.uint16
        assert decoded.tolist() == ids.tolist()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 300), st.integers(0, 2**32))
def test_round_trip_of_any_grid(height, width, num_codes, seed):
    codec = learned(height, width, num_codes, num_images=2)
    ids = np.random.default_rng(seed).integers(0, num_codes, height * width)
    assert codec.decode(codec.encode(ids), ids.size).tolist() == ids.tolist()


def test_all_codes_of_the_largest_codebook_can_be_encoded():
    grids = np.random.default_rng(0).integers(0, 65536, (2, 32, 32))
    codec = ContextCodec.learn(grids, np.random.default_rng(1).standard_normal((65536, 40)))
    ids = np.append(np.arange(65536 - 1022, 65536), [0, 65535])
    assert (codec.decode(codec.encode(ids), 1024) == ids).all()


def test_every_place_is_coded_once_and_after_its_neighbors():
    for height, width in GRIDS:
        codec = learned(height, width, 4, num_images=1)
        known = set(codec._coarse.tolist())
        for step in codec._steps:
            for positions, neighbors in step.blocks():
                around = set(neighbors.ravel().tolist())
                assert around - {height * width} <= known
                assert (neighbors < height * width).any(axis=0).all()
                assert not known & set(positions.tolist())
            known |= {position for block in step.blocks() for position in block.positions.tolist()}
        assert known == set(range(height * width))


def golden_parts() -> tuple[bytes, bytes, np.ndarray]:
    """Table, payload and ids (63,) of the golden file: 40 codes, 7 x 9 tokens."""
    data = (GOLDEN / "codec_context_v1.bin").read_bytes()
    size = int.from_bytes(data[:4], "little")
    return data[4 : 4 + size], data[4 + size :], smooth_grids(1, 7, 9, 40, seed=5).ravel()


def test_golden_table_and_payload():
    table, payload, ids = golden_parts()
    codec = codecs.build("context", 40, grid=(7, 9), table=table)
    assert codec.encode(ids) == payload
    assert codec.decode(payload, 63).tolist() == ids.tolist()


def test_learning_twice_gives_the_same_bytes_and_the_table_builds_the_same_codec():
    codec = learned(8, 8, 40)
    assert learned(8, 8, 40).table == codec.table
    built = codecs.build("context", 40, np.ones(40, int), grid=(8, 8), table=codec.table)
    ids = smooth_grids(1, 8, 8, 40, seed=1).ravel()
    assert built.table == codec.table
    assert built.encode(ids) == codec.encode(ids)


def test_the_table_of_one_grid_serves_another():
    codec = codecs.build("context", 40, grid=(3, 21), table=learned(8, 8, 40).table)
    ids = smooth_grids(1, 3, 21, 40).ravel()
    assert codec.decode(codec.encode(ids), 63).tolist() == ids.tolist()


def test_every_change_of_one_byte_truncation_and_other_length_is_refused():
    table, payload, _ = golden_parts()
    codec = codecs.build("context", 40, grid=(7, 9), table=table)
    for position in range(len(payload)):
        for change in range(1, 256):
            damaged = bytearray(payload)
            damaged[position] ^= change
            with pytest.raises(CodecError):
                codec.decode(bytes(damaged), 63)
    for data in [*(payload[:size] for size in range(len(payload))), payload + b"\0", payload + b"\1", payload * 2]:
        with pytest.raises(CodecError):
            codec.decode(data, 63)
    for num_tokens in [*range(63), *range(64, 200), -1, 2**24, 2**80]:
        with pytest.raises(CodecError, match="number of tokens"):
            codec.decode(payload, num_tokens)


def test_another_table_or_grid_is_refused():
    table, payload, _ = golden_parts()
    for other, grid in [(learned(7, 9, 40).table, (7, 9)), (table, (9, 7)), (table, (1, 63))]:
        with pytest.raises(CodecError, match="check"):
            codecs.build("context", 40, grid=grid, table=other).decode(payload, 63)


def test_random_bytes_under_a_right_check_are_refused_or_canonical():
    rng, codec = np.random.default_rng(0), learned(2, 3, 5)
    accepted = 0
    for _ in range(1000):
        data = codec._checksum.wrap(rng.bytes(rng.integers(0, 6)), 6)
        try:
            ids = codec.decode(data, 6)
        except CodecError:
            continue
        accepted += 1
        assert (ids < 5).all() and codec.encode(ids) == data
    assert 0 < accepted < 1000


def test_damaged_tables_are_refused_or_make_a_codec():
    table, rng = golden_parts()[0], np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(table)
        for position in rng.integers(0, len(table), rng.integers(1, 4)):
            damaged[position] ^= rng.integers(1, 256)
        damaged = bytes(damaged[: rng.integers(len(table))] if rng.random() < 0.3 else damaged)
        try:
            codec = codecs.build("context", 40, grid=(2, 2), table=damaged)
        except CodecError:
            refused += 1
            continue
        assert codec.decode(codec.encode(np.arange(36, 40)), 4).tolist() == [36, 37, 38, 39]
    assert 0 < refused < 400


HEADER = reference.u32(2) + reference.u32(1) + reference.u32(1) + b"\1\2\3"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"", "context table of 0 bytes"),
        (reference.u32(3) + HEADER[4:] + bytes(4), "got 3 codes"),
        (reference.u32(2) + reference.u32(2**31) + reference.u32(2**31), "2147483648 classes"),
        (HEADER + bytes(5), "5 numbers"),
        (HEADER + bytes(7), "7 numbers"),
        (HEADER + b"\0\0\1\0\0\0\0", "expected another 1 ids"),
        (HEADER + b"\0\0\1\0\0\0\2\0", "id 2, expected 0 .. 1"),
        (HEADER + b"\0\0\2\0\0\0\0\1\0\0", "id 2, expected 0 .. 1"),
        (HEADER + b"\0\0\0\0\0\x80", "cut off"),
        (HEADER + b"\0\0\0\0\0\x80\x80\x80\x80\x80\1", "longer than 5 bytes"),
        (HEADER + b"\0\0\0\0\0\xff\xff\xff\xff\x7f", "expected at most 4294967295"),
        (HEADER + b"\xff\xff\xff\xff\x0f\1\0\0\0\0", "counts of 4294967296 and 0 tokens"),
    ],
)
def test_tables_that_learning_never_makes_are_refused(table, message):
    with pytest.raises(CodecError, match=message):
        codecs.build("context", 2, grid=(2, 2), table=table)


def test_the_smallest_table_is_accepted():
    codec = codecs.build("context", 2, grid=(2, 2), table=HEADER + b"\0\0\1\0\0\0\1\0")
    assert codec.decode(codec.encode(np.array([0, 1, 1, 0])), 4).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (2, 2)}, "expected a grid and a learned table"),
        ({"table": HEADER + bytes(6)}, "expected a grid and a learned table"),
        ({"grid": (0, 2), "table": HEADER + bytes(6)}, "grid: got 0 x 2"),
        ({"grid": (2**13, 2**12), "table": HEADER + bytes(6)}, "grid: got 8192 x 4096"),
    ],
)
def test_build_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        codecs.build("context", 2, **arguments)


@pytest.mark.parametrize(
    ("grids", "codebook", "message"),
    [
        (np.zeros((2, 2), int), np.eye(2), "grids: got"),
        (np.zeros((0, 2, 2), int), np.eye(2), "grids: got"),
        (np.full((1, 2, 2), 2), np.eye(2), "ids: got values 2 .. 2"),
        (np.zeros((1, 2, 2)), np.eye(2), "array of integers"),
        (np.zeros((1, 2, 2), int), np.full((2, 2), np.nan), "codebook: got"),
        (np.zeros((1, 2, 2), int), np.zeros(2), "codebook: got"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_learn_refuses(grids, codebook, message):
    with pytest.raises(ValueError, match=message):
        ContextCodec.learn(grids, codebook)


@pytest.mark.parametrize(
    ("ids", "message"), [([0] * 5, "5 tokens, expected 2 x 2"), ([0, 1, 2, 0], "expected 0 .. 1")]
)
@pytest.mark.usefixtures("unchecked")
def test_encode_refuses(ids, message):
    with pytest.raises(ValueError, match=message):
        codecs.build("context", 2, grid=(2, 2), table=HEADER + bytes(6)).encode(ids)
