"""The codec "ans": exact bytes, agreement with a reference in plain integers, entropy, and damaged payloads."""

from binascii import crc_hqx

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import codec_reference as reference

from seitpp import codec as codecs
from seitpp.codec import CodecError


def zipf(num_codes: int, exponent: float) -> np.ndarray:
    share = 1 / np.arange(1, num_codes + 1) ** exponent
    return share / share.sum()


@st.composite
def images(draw, max_codes=600):
    """(counts, ids): tables of every shape, also with codes that occur in ids and never in the counts."""
    num_codes = draw(st.one_of(st.integers(1, 5), st.integers(1, max_codes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    high = draw(st.sampled_from([2, 10, 10**6, 2**36]))
    counts = rng.integers(0, high, num_codes)
    counts[rng.integers(num_codes)] += 1
    ids = rng.choice(num_codes, draw(st.integers(0, 300)), p=zipf(num_codes, draw(st.sampled_from([0, 1, 3]))))
    return counts, ids


@settings(max_examples=150, deadline=None)
@given(images())
def test_bytes_agree_with_the_reference_and_decode(image):
    counts, ids = image
    codec = codecs.build("ans", len(counts), counts)
    payload = codec.encode(ids)
    body = reference.ans_body(counts.tolist(), ids.tolist())
    assert payload == reference.check(reference.counts_bytes(counts.tolist()), len(ids), body) + body
    assert reference.ans_ids(counts.tolist(), body, len(ids)) == ids.tolist()
    decoded = codec.decode(payload, len(ids))
    assert decoded.dtype == np.uint16
    assert decoded.tolist() == ids.tolist()


@pytest.mark.parametrize("num_codes", [2**15, 2**16 - 1, 2**16])
def test_large_tables_agree_with_the_reference(num_codes):
    rng = np.random.default_rng(num_codes)
    counts = rng.integers(0, 2**36, num_codes) * rng.integers(0, 2, num_codes)
    ids = np.append(rng.integers(0, num_codes, 500), [0, num_codes - 1])
    codec = codecs.build("ans", num_codes, counts)
    assert codec.encode(ids)[2:] == reference.ans_body(counts.tolist(), ids.tolist())
    assert (codec.decode(codec.encode(ids), len(ids)) == ids).all()


def golden_ids(num_codes: int, num_tokens: int) -> np.ndarray:
    position = np.arange(num_tokens)
    return position * position * 7 % num_codes * position % num_codes


GOLDEN = {
    # (codes, tokens): counts are 1, 2, .. K; the payload in hex.
    (1, 16): "fcda",
    (2, 40): "433ff98100ecc601",
    (64, 24): "55b15eca05cdac1e5bb5df7269b1ef3cc5c87f0d003a3b1d",
    (391, 32): "0bdcd2517040dfa965deef582bf1f9e82d1acacdb0d70962075816af058d031a00072b00003c2b36",
    (65536, 12): "bda9ed9f017b1a610043b8280011d00400d0480100450700004400000000004412",
}


@pytest.mark.parametrize(("num_codes", "num_tokens"), GOLDEN)
def test_golden_payloads(num_codes, num_tokens):
    codec, ids = codecs.build("ans", num_codes, np.arange(1, num_codes + 1)), golden_ids(num_codes, num_tokens)
    golden = bytes.fromhex(GOLDEN[num_codes, num_tokens])
    assert codec.encode(ids) == golden
    assert codec.decode(golden, num_tokens).tolist() == ids.tolist()


def test_examples_of_the_format_page():
    codec = codecs.build("ans", 3, [2, 1, 1])
    assert reference.left([2, 1, 1]) == [0, 8388607, 12582911, 16777216]
    assert codec.encode(np.array([0, 1, 2, 0])) == bytes.fromhex("919f15")
    codec = codecs.build("ans", 4096, [1] * 4096)
    assert codec.encode(np.array([5, 1, 2])) == bytes.fromhex("ecb101500002")


@pytest.mark.parametrize("by_popularity", [True, False])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.8, 1.0, 1.2])
def test_size_is_within_half_a_per_cent_of_the_entropy(exponent, by_popularity):
    """Images of 1,024 tokens of 391 codes, numbered by popularity or in any order."""
    ids = np.random.default_rng(0).choice(391, (500, 1024), p=zipf(391, exponent))
    if not by_popularity:
        ids = np.random.default_rng(1).permutation(391)[ids]
    counts = np.bincount(ids.ravel(), minlength=391)
    codec = codecs.build("ans", 391, counts)
    share = counts[counts > 0] / counts.sum()
    optimum = -(share * np.log2(share)).sum() * 1024 / 8
    assert np.mean([len(codec.encode(image)) for image in ids]) <= 1.005 * optimum


def test_a_lone_code_costs_no_bits():
    codec = codecs.build("ans", 1, [7])
    payload = codec.encode(np.zeros(1024, int))
    assert len(payload) == 2
    assert codec.decode(payload, 1024).tolist() == [0] * 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zip", 4, [1, 1, 1, 1]), "'ans'"),
        (("ans", 4, None), "counts: got none"),
        (("ans", 4, [1, 1, 1]), "expected 4 integers"),
        (("ans", 4, [1.0, 1, 1, 1]), "expected 4 integers"),
        (("ans", 4, [1, 1, -1, 1]), "no negative count"),
        (("ans", 4, [0, 0, 0, 0]), "sum of 1"),
        (("ans", 2, [2**53, 1]), "sum of 1"),
        (("ans", 2, [10**30, 1]), "expected 2 integers"),
        (("ans", 0, []), "number of codes"),
        (("ans", 2**16 + 1, None), "number of codes"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_build_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        codecs.build(*arguments)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 4], "expected 0 .. 3"),
        ([-1, 0], "expected 0 .. 3"),
        ([0.0, 1.0], "array of integers"),
        ([True, False], "array of integers"),
        ([[0, 1], [2, 3]], "1-D array"),
        (np.broadcast_to(np.int8(0), 2**24 + 1), "at most 16777216"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_encode_refuses(ids, message):
    with pytest.raises(ValueError, match=message):
        codecs.build("ans", 4, [1, 1, 1, 1]).encode(ids)


@pytest.mark.parametrize("num_tokens", [-1, 2**24 + 1, 2**40, 2**80])
def test_a_false_number_of_tokens_is_refused_before_allocating(num_tokens):
    with pytest.raises(CodecError, match="number of tokens"):
        codecs.build("ans", 4, [1, 1, 1, 1]).decode(b"\0\0\1", num_tokens)


@pytest.fixture(scope="module")
def payload():
    """A codec, an image of 256 tokens, and its payload."""
    ids = np.random.default_rng(1).choice(64, 256, p=zipf(64, 1.0))
    codec = codecs.build("ans", 64, np.bincount(ids, minlength=64))
    return codec, ids, codec.encode(ids)


def test_every_change_of_one_byte_is_refused(payload):
    codec, ids, data = payload
    for position in range(len(data)):
        for change in range(1, 256):
            damaged = bytearray(data)
            damaged[position] ^= change
            with pytest.raises(CodecError):
                codec.decode(bytes(damaged), len(ids))


def test_every_truncation_and_extension_is_refused(payload):
    codec, ids, data = payload
    for size in range(len(data)):
        with pytest.raises(CodecError):
            codec.decode(data[:size], len(ids))
    for tail in (b"\0", b"\0\0\0\0", b"\1", data):
        with pytest.raises(CodecError):
            codec.decode(data + tail, len(ids))


def test_every_other_number_of_tokens_is_refused(payload):
    codec, ids, data = payload
    for num_tokens in range(1024):
        if num_tokens != len(ids):
            with pytest.raises(CodecError):
                codec.decode(data, num_tokens)


def test_the_table_of_another_store_is_refused(payload):
    _, ids, data = payload
    counts = np.bincount(ids, minlength=64)
    for code in range(64):
        with pytest.raises(CodecError):
            codecs.build("ans", 64, counts + (np.arange(64) == code)).decode(data, len(ids))
    with pytest.raises(CodecError):
        codecs.build("ans", 65, np.append(counts, 0)).decode(data, len(ids))


def forge(codec, body: bytes, num_tokens: int) -> bytes:
    """A payload whose check is right: what a hostile writer can make."""
    return codec._checksum.wrap(body, num_tokens)


@pytest.mark.parametrize("num_codes", [1, 2, 3, 391])
def test_random_bytes_are_refused_or_canonical(num_codes):
    rng = np.random.default_rng(num_codes)
    codec = codecs.build("ans", num_codes, rng.integers(1, 1000, num_codes))
    accepted = 0
    for _ in range(2000):
        body, num_tokens = rng.bytes(rng.integers(0, 12)), int(rng.integers(0, 64))
        data = forge(codec, body, num_tokens) if rng.random() < 0.9 else body
        try:
            ids = codec.decode(data, num_tokens)
        except CodecError:
            continue
        accepted += 1
        assert ids.shape == (num_tokens,) and (ids < num_codes).all()
        assert codec.encode(ids) == data
    assert 0 < accepted < 2000


def test_trailing_zeros_and_bits_of_a_lone_code_are_refused(payload):
    codec, ids, data = payload
    with pytest.raises(CodecError, match="canonical"):
        codec.decode(forge(codec, data[2:] + b"\0", len(ids)), len(ids))
    lone = codecs.build("ans", 1, [7])
    with pytest.raises(CodecError, match="canonical"):
        lone.decode(forge(lone, b"\1", 5), 5)


@pytest.mark.parametrize(
    ("num_codes", "num_tokens"), [(2, 24), (3, 5), (391, 2), (391, 3), (65536, 1), (65536, 2)]
)
def test_a_seed_that_no_ids_make_is_refused(num_codes, num_tokens):
    """Images of seed only: exactly the numbers below K^m are accepted."""
    codec = codecs.build("ans", num_codes, [1] * num_codes)
    for number in (0, 1, num_codes**num_tokens - 1):
        body = number.to_bytes(5, "little").rstrip(b"\0")
        ids = codec.decode(forge(codec, body, num_tokens), num_tokens)
        assert sum(int(i) * num_codes**at for at, i in enumerate(ids)) == number
    for number in (num_codes**num_tokens, 2**40, 2**64 - 1, 2**200):
        body = number.to_bytes(26, "little").rstrip(b"\0")
        with pytest.raises(CodecError, match=r"goes on after its last token|expected at most"):
            codec.decode(forge(codec, body, num_tokens), num_tokens)


def test_too_many_bytes_under_a_right_check_are_refused(payload):
    codec, _, data = payload
    with pytest.raises(CodecError, match="goes on after its last token"):
        codec.decode(forge(codec, data[2:], 200), 200)


def test_one_byte_does_not_pass_for_a_check_that_ends_in_zero():
    lone, found = codecs.build("ans", 1, [7]), 0
    for num_tokens in range(2000):
        data = forge(lone, b"", num_tokens)
        if data[1] == 0:
            found += 1
            with pytest.raises(CodecError):
                lone.decode(data[:1], num_tokens)
    assert found


def test_decode_takes_a_memoryview(payload):
    codec, ids, data = payload
    assert (codec.decode(memoryview(b"xx" + data)[2:], len(ids)) == ids).all()


def test_the_check_is_the_documented_crc():
    assert crc_hqx(b"123456789", 0xFFFF) == 0x29B1
