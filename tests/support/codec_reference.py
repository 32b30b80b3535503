"""The payloads once more, from docs/format.md alone: plain integers, one token at a time, for the tests."""

from bisect import bisect_right


def check(table: bytes, num_tokens: int, body: bytes) -> bytes:
    crc = 0xFFFF
    for byte in table + u32(num_tokens) + body:
        crc ^= byte << 8
        for _ in range(8):
            crc = ((crc << 1) ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc.to_bytes(2, "little")


def u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def counts_bytes(counts: list[int]) -> bytes:
    return u32(len(counts)) + b"".join(count.to_bytes(8, "little") for count in counts)


# ans


def left(counts: list[int]) -> list[int]:
    scale = float(2**24 - len(counts)) / float(sum(counts))
    left, below = [], 0
    for i, count in enumerate(counts):
        left.append(int(float(below) * scale) + i)
        below += count
    return [*left, 2**24]


def ans_body(counts: list[int], ids: list[int]) -> bytes:
    table = left(counts)
    return b"" if len(counts) == 1 else push([(table, i) for i in ids], len(counts))


def seed_size(num_codes: int, num_tokens: int) -> int:
    size = 0
    while num_codes**size < 2**24 and size < num_tokens:
        size += 1
    return size


def push(tokens: list[tuple[list[int], int]], num_codes: int) -> bytes:
    """Body of (left, id) of each token, in the order of decoding."""
    state, words, coded = 0, [], len(tokens) - seed_size(num_codes, len(tokens))
    for _, i in reversed(tokens[coded:]):
        state = state * num_codes + i
    for left, i in reversed(tokens[:coded]):
        p = left[i + 1] - left[i]
        if state >= p << 40:
            words.append(state % 2**32)
            state //= 2**32
        state = (state // p << 24) + left[i] + state % p
    while state:
        words.append(state % 2**32)
        state //= 2**32
    return b"".join(u32(word) for word in words).rstrip(b"\0")


def ans_ids(counts: list[int], body: bytes, num_tokens: int) -> list[int]:
    body += bytes(-len(body) % 4)
    words = [int.from_bytes(body[i : i + 4], "little") for i in range(0, len(body), 4)]
    num_codes, table, state, ids = len(counts), left(counts), 0, []
    if num_codes == 1:
        assert not body
        return [0] * num_tokens
    while words and state < 2**32:
        state = state * 2**32 + words.pop()
    size = seed_size(num_codes, num_tokens)
    for _ in range(num_tokens - size):
        q = state % 2**24
        i = bisect_right(table, q) - 1
        state = (table[i + 1] - table[i]) * (state >> 24) + q - table[i]
        if state < 2**32 and words:
            state = state * 2**32 + words.pop()
        ids.append(i)
    assert state < num_codes**size and not words
    for _ in range(size):
        state, i = divmod(state, num_codes)
        ids.append(i)
    return ids


# escape, packed, huffman


def escape(ids: list[int]) -> bytes:
    return b"".join(b"\xff" * (i // 255) + bytes([i % 255]) for i in ids)


def bits_body(bits: str) -> bytes:
    return bytes(int(bits[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8))


def packed_body(num_codes: int, ids: list[int]) -> bytes:
    width = 0
    while 2**width < num_codes:
        width += 1
    return bits_body("".join(f"{i:0{width}b}" for i in ids) if width else "")


def huffman_words(counts: list[int]) -> list[str]:
    lightest = max(1, sum(counts) // 2**20)
    nodes = [(max(count, lightest), i, [i]) for i, count in enumerate(counts)]
    lengths = [0] * len(counts)
    for made in range(len(counts) - 1):
        nodes.sort()
        (a, _, below), (b, _, above), *rest = nodes
        for i in below + above:
            lengths[i] += 1
        nodes = [*rest, (a + b, len(counts) + made, below + above)]
    words, word, previous = [""] * len(counts), -1, 0
    for length, i in sorted((length, i) for i, length in enumerate(lengths)):
        word = word + 1 << length - previous
        previous = length
        words[i] = f"{word:0{length}b}" if length else ""
    return words


def huffman_body(counts: list[int], ids: list[int]) -> bytes:
    words = huffman_words(counts)
    return bits_body("".join(words[i] for i in ids))


# context


def signed_rows(data: bytes, rows: int, columns: int) -> list[list[int]]:
    numbers = [byte - 256 if byte > 127 else byte for byte in data]
    return [numbers[columns * row : columns * (row + 1)] for row in range(rows)]


class Table:
    def __init__(self, data: bytes) -> None:
        num_codes, classes, components = (int.from_bytes(data[i : i + 4], "little") for i in (0, 4, 8))
        at = 12 + num_codes * components
        self.vectors = signed_rows(data[12:at], num_codes, components)
        self.centers = signed_rows(data[at : at + classes * components], classes, components)
        self.numbers, self.num_codes = iter(data[at + classes * components :]), num_codes
        self.static = [self.number() for _ in range(num_codes)]
        sizes = [self.number() for _ in range(4 * classes)]
        ids = []
        for size in sizes:
            ids.append([])
            for _ in range(size):
                ids[-1].append((ids[-1][-1] if ids[-1] else -1) + 1 + self.number())
        self.counts = [{i: self.number() + 1 for i in table} for table in ids]
        assert next(self.numbers, None) is None

    def number(self) -> int:
        byte = next(self.numbers)
        return byte if byte < 128 else byte - 128 + 128 * self.number()

    def weights(self, table: int | None) -> list[int]:
        shares = [count + 1 for count in self.static]
        if table is None or not self.counts[table]:
            return shares
        counts = self.counts[table]
        weights = [3 * 4096 * len(counts) * share // sum(shares) for share in shares]
        for i, count in counts.items():
            weights[i] += 4096 * (4 * count - 3)
        return weights

    def nearest(self, ids: list[int]) -> int:
        def score(center: list[int]) -> int:
            square = sum(c * c for c in center)
            return sum(square - 2 * sum(c * v for c, v in zip(center, self.vectors[i], strict=True)) for i in ids)

        scores = [score(center) for center in self.centers]
        return scores.index(min(scores))


def context_body(data: bytes, grid: tuple[int, int], ids: list[int]) -> bytes:
    table, (height, width) = Table(data), grid
    pixel = {(y, x): ids[y * width + x] for y in range(height) for x in range(width)}
    order = [(None, pixel[y, x]) for y in range(0, height, 8) for x in range(0, width, 8)]
    for s in (4, 2, 1):
        for kind in (0, 1):
            offsets = [(-s, -s), (-s, s), (s, -s), (s, s)] if kind == 0 else [(-s, 0), (0, -s), (0, s), (s, 0)]
            step = []
            for y, x in pixel:
                odd = (y // s % 2, x // s % 2)
                if y % s or x % s or (odd != (1, 1) if kind == 0 else odd not in ((0, 1), (1, 0))):
                    continue
                near = [pixel[y + dy, x + dx] for dy, dx in offsets if (y + dy, x + dx) in pixel]
                step.append(
                    ((kind if s == 1 else kind + 2) * len(table.centers) + table.nearest(near), pixel[y, x])
                )
            order += sorted(step, key=lambda token: token[0])
    lefts = {number: left(table.weights(number)) for number in {number for number, _ in order}}
    return push([(lefts[number], i) for number, i in order], table.num_codes) if table.num_codes > 1 else b""
