"""The codecs "escape", "huffman" and "packed": exact bytes, agreement with a reference, and damaged payloads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import codec_reference as reference

from seitpp import codec as codecs
from seitpp.codec import CodecError

NAMES = ("escape", "huffman", "packed")
SEALED = ("huffman", "packed")


@st.composite
def images(draw, max_codes=65536):
    """(counts, ids): few codes and many, and codes that occur in ids and never in the counts."""
    num_codes = draw(st.one_of(st.integers(1, 9), st.integers(250, 520), st.integers(1, max_codes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = rng.integers(0, draw(st.sampled_from([1, 2, 10**6, 2**36])), num_codes)
    counts[rng.integers(num_codes)] += 1
    ids = rng.integers(0, draw(st.integers(1, num_codes)), draw(st.integers(0, 300)))
    return counts, num_codes - 1 - ids if draw(st.booleans()) else ids


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(images())
def test_round_trip(name, image):
    counts, ids = image
    codec = codecs.build(name, len(counts), counts)
    decoded = codec.decode(codec.encode(ids), len(ids))
    assert decoded.dtype == np.uint16
    assert decoded.tolist() == ids.tolist()


@settings(max_examples=60, deadline=None)
@given(images(max_codes=300))
def test_bytes_agree_with_the_reference(image):
    counts, ids = image[0].tolist(), image[1].tolist()
    num_codes = len(counts)
    assert codecs.build("escape", num_codes).encode(image[1]) == reference.escape(ids)
    body = reference.packed_body(num_codes, ids)
    expected = reference.check(reference.u32(num_codes), len(ids), body) + body
    assert codecs.build("packed", num_codes).encode(image[1]) == expected
    body = reference.huffman_body(counts, ids)
    expected = reference.check(reference.counts_bytes(counts), len(ids), body) + body
    assert codecs.build("huffman", num_codes, counts).encode(image[1]) == expected


GOLDEN_IDS = [0, 1, 254, 255, 256, 509, 510, 599, 3, 0]
GOLDEN = {
    # 600 codes, counts 600, 599, .. 1.
    "escape": "0001feff00ff01fffeffff00ffff590300",
    "packed": "af1c000013f8ff401fd7fa5700c000",
    "huffman": "dccb0001a954ea9f43e8ffffc0c000",
}


@pytest.mark.parametrize("name", NAMES)
def test_golden_payloads(name):
    codec, golden = codecs.build(name, 600, np.arange(600, 0, -1)), bytes.fromhex(GOLDEN[name])
    assert codec.encode(np.array(GOLDEN_IDS)) == golden
    assert codec.decode(golden, len(GOLDEN_IDS)).tolist() == GOLDEN_IDS


def test_examples_of_the_format_page():
    ids = np.array([0, 1, 2, 0])
    assert reference.huffman_words([2, 1, 1]) == ["0", "10", "11"]
    assert codecs.build("huffman", 3, [2, 1, 1]).encode(ids).hex() == "f80658"
    assert codecs.build("packed", 3).encode(ids).hex() == "092f18"
    assert codecs.build("escape", 1000).encode(np.array([7, 254, 255, 510])).hex() == "07feff00ffff00"


def test_escape_is_at_most_257_bytes_a_token_and_one_for_popular_codes():
    codec = codecs.build("escape", 65536)
    assert len(codec.encode(np.array([65535]))) == 65535 // 255 + 1
    assert len(codec.encode(np.arange(255))) == 255


def test_a_lone_code_costs_no_bits():
    for name in SEALED:
        codec = codecs.build(name, 1, [7])
        assert len(codec.encode(np.zeros(1024, int))) == 2
        assert codec.decode(codec.encode(np.zeros(1024, int)), 1024).tolist() == [0] * 1024


@pytest.mark.parametrize("num_codes", [2, 391, 65536])
def test_huffman_words_stay_within_32_bits_for_the_steepest_counts(num_codes):
    counts = [1, 1]
    while len(counts) < num_codes and sum(counts) < 2**51:
        counts.append(counts[-1] + counts[-2])
    codec = codecs.build("huffman", num_codes, counts[:num_codes] + [0] * (num_codes - len(counts)))
    ids = np.arange(num_codes)
    assert (codec.decode(codec.encode(ids), num_codes) == ids).all()
    assert codec._lengths.max() <= 32
    assert (2.0**-codec._lengths).sum() == 1


def test_huffman_is_within_a_tenth_of_a_bit_of_the_entropy():
    rng = np.random.default_rng(0)
    ids = rng.choice(391, 100_000, p=rng.dirichlet(np.full(391, 0.7)))
    counts = np.bincount(ids, minlength=391)
    share = counts[counts > 0] / len(ids)
    entropy = -(share * np.log2(share)).sum()
    size = len(codecs.build("huffman", 391, counts).encode(ids)) * 8 / len(ids)
    assert entropy <= size <= entropy + 0.1


@pytest.fixture(scope="module", params=NAMES)
def payload(request):
    """A codec of 300 codes, an image of 64 tokens, and its payload."""
    ids = np.minimum(np.random.default_rng(1).geometric(0.01, 64), 299)
    codec = codecs.build(request.param, 300, np.bincount(ids, minlength=300))
    return codec, ids, codec.encode(ids)


def test_every_change_of_one_byte_is_refused_or_for_escape_a_code(payload):
    codec, ids, data = payload
    for position in range(len(data)):
        for change in range(1, 256):
            damaged = bytearray(data)
            damaged[position] ^= change
            try:
                decoded = codec.decode(bytes(damaged), len(ids))
            except CodecError:
                continue
            assert codec.name == "escape" and decoded.shape == (64,) and decoded.max() < 300


def test_every_truncation_extension_and_other_length_is_refused(payload):
    codec, ids, data = payload
    for size in range(len(data)):
        with pytest.raises(CodecError):
            codec.decode(data[:size], len(ids))
    for tail in (b"\0", b"\xff", b"\1\2", data):
        with pytest.raises(CodecError):
            codec.decode(data + tail, len(ids))
    for num_tokens in [*range(len(ids)), *range(len(ids) + 1, 300), -1, 2**24 + 1, 2**80]:
        with pytest.raises(CodecError):
            codec.decode(data, num_tokens)


def test_the_table_of_another_store_is_refused():
    ids, counts = np.arange(64), np.arange(1, 65)
    data = codecs.build("huffman", 64, counts).encode(ids)
    for code in range(64):
        with pytest.raises(CodecError, match="check"):
            codecs.build("huffman", 64, counts + (np.arange(64) == code)).decode(data, 64)
    with pytest.raises(CodecError, match="check"):
        codecs.build("packed", 63).decode(codecs.build("packed", 64).encode(ids), 64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_codes", [1, 2, 3, 391])
def test_random_bytes_are_refused_or_canonical(name, num_codes):
    rng = np.random.default_rng(num_codes)
    codec = codecs.build(name, num_codes, rng.integers(1, 1000, num_codes))
    accepted = 0
    for _ in range(3000):
        body, num_tokens = (
            rng.integers(0, rng.choice([2, 256]), rng.integers(0, 5), np.uint8),
            int(rng.integers(6)),
        )
        data = body.tobytes()
        # A right check: what a hostile writer can make.
        data = data if name == "escape" else codec._checksum.wrap(data, num_tokens)
        try:
            ids = codec.decode(data, num_tokens)
        except CodecError:
            continue
        accepted += 1
        assert ids.shape == (num_tokens,) and (ids < num_codes).all()
        assert codec.encode(ids) == data
    assert 0 < accepted < 3000


@pytest.mark.parametrize(
    ("data", "num_tokens", "message"),
    [
        (b"\1\2\xff", 3, "3 bytes end inside token 2, expected 3"),
        (b"\1\2", 3, "2 bytes end before token 2, expected 3"),
        (b"\1\2\3\4", 3, "byte 3: the 3 tokens end here, of 4 bytes"),
        (b"\1\2\3\xff", 3, "byte 3: the 3 tokens end here, of 4 bytes"),
        (b"\1\xff\x2d\3", 3, "token 1: id 300, expected 0 .. 299"),
        (b"\1\xff\xff\3\3", 3, "token 1: id 513, expected 0 .. 299"),
        (b"\1" + b"\xff" * 999 + b"\3\3", 3, "payload of 1002 bytes, expected at most 6 for 3 tokens"),
    ],
)
def test_escape_names_the_place_of_damage(data, num_tokens, message):
    with pytest.raises(CodecError, match=message):
        codecs.build("escape", 300).decode(data, num_tokens)


@pytest.mark.parametrize(
    ("name", "body", "num_tokens", "message"),
    [
        ("packed", b"", 1, "body of 0 bytes, expected 1 for 1 tokens"),
        ("packed", b"\0\0", 1, "payload of 4 bytes, expected at most 3 for 1 tokens"),
        ("packed", b"\1", 1, "bits after its last token"),
        ("packed", b"\xe0", 1, "token 0: id 7, expected 0 .. 4"),
        ("huffman", b"\0\0", 1, "payload of 4 bytes, expected at most 3 for 1 tokens"),
        ("huffman", b"\0\0", 3, "more than 3 tokens"),
        ("huffman", b"\1", 1, "more than 1 tokens"),
        ("huffman", b"", 1, "body of 0 bytes ends before token 0"),
        ("huffman", b"\xff", 3, "body of 1 bytes ends in token 2"),
        ("huffman", b"\0", 2**24, "body of 1 bytes ends before token 4"),
    ],
)
def test_bodies_that_no_encoder_writes_are_refused_under_a_right_check(name, body, num_tokens, message):
    codec = codecs.build(name, 5, [1, 1, 1, 1, 1])
    with pytest.raises(CodecError, match=message):
        codec.decode(codec._checksum.wrap(body, num_tokens), num_tokens)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("unchecked")
def test_encode_refuses_what_is_no_id(name):
    for ids in ([0, 4], [-1, 0], [0.0], [[0]]):
        with pytest.raises(ValueError, match="ids: got"):
            codecs.build(name, 4, [1, 1, 1, 1]).encode(ids)


def test_build_refuses():
    with pytest.raises(ValueError, match="counts: got none"):
        codecs.build("huffman", 4)
    with pytest.raises(ValueError, match="only 'context' has one"):
        codecs.build("packed", 4, table=b"1234")
    for name in NAMES:
        with pytest.raises(ValueError, match="number of codes"):
            codecs.build(name, 65537)


def test_decode_takes_a_memoryview(payload):
    codec, ids, data = payload
    assert (codec.decode(memoryview(b"xx" + data)[2:], len(ids)) == ids).all()
