"""Lookups in the codebook for whole batches on their device: ids to vectors, and vectors to the nearest ids."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Integer
from torch import Tensor, nn

from seitpp.books import Books, index_sizes

# Size of a chunk of the token x code similarity matrix: 64 MiB in fp32 on a CPU; 512 MiB on other devices, where
# many small chunks would be slow.
LOOKUP_CELLS, DEVICE_LOOKUP_CELLS = 1 << 24, 1 << 27
LOOKUPS = ("cosine", "euclidean")


def embed(
    ids: Integer[Tensor, "batch height width"], codebook: Float[Tensor, "codes dim"]
) -> Float[Tensor, "batch dim height width"]:
    """Return the code vectors of the ids as maps, channels-last in memory."""
    return F.embedding(ids.long(), codebook).permute(0, 3, 1, 2)


def nearest(
    maps: Float[Tensor, "batch dim height width"], codebook: Float[Tensor, "codes dim"], lookup: str = "cosine"
) -> Int64[Tensor, "batch height width"]:
    """Return the id of the code nearest to each vector; of equally near codes, the smallest id.

    `lookup` "cosine": the largest cosine similarity, both sides L2-normalized (SeiT release); "euclidean": the
    smallest distance. Computed in fp32, since half precision changes ids, and in chunks, which limits the memory
    for the token x code matrix.
    """
    batch, dim, height, width = maps.shape
    with full_precision(maps.device):
        vectors = maps.detach().float().permute(0, 2, 3, 1).reshape(-1, dim)
        rows = codebook.detach().float()
        if lookup == "cosine":
            vectors, rows = F.normalize(vectors, dim=1), F.normalize(rows, dim=1)
            offsets = rows.new_zeros(())
        else:  # |z - c|^2 is smallest where z c - |c|^2 / 2 is largest; adding |z|^2 would only lose precision
            offsets = rows.square().sum(dim=1) / -2
        cells = LOOKUP_CELLS if maps.device.type == "cpu" else DEVICE_LOOKUP_CELLS
        chunks = vectors.split(max(1, cells // len(rows)))
        ids = torch.cat([torch.addmm(offsets, chunk, rows.T).argmax(dim=1) for chunk in chunks])
    return ids.view(batch, height, width)


def synonyms(codebook: Float[Tensor, "codes dim"], n: int = 5) -> Int64[Tensor, "codes neighbors"]:
    """Return the n other codes nearest to each code by Euclidean distance, nearest first (SeiT, Token-EDA).

    There are at most K - 1 of them. Distances are computed from fp32 differences, not by a matrix product, whose
    rounding would change the order of codes that are close together.
    """
    rows = codebook.detach().float()
    codes = torch.arange(len(rows), device=rows.device)
    neighbors = []
    for chunk in codes.split(max(1, LOOKUP_CELLS // len(rows))):
        distances = torch.cdist(rows[chunk], rows, compute_mode="donot_use_mm_for_euclid_dist")
        distances[chunk - chunk[0], chunk] = torch.inf
        neighbors.append(distances.topk(min(n, len(rows) - 1), largest=False).indices)
    return torch.cat(neighbors)


class Codebook(nn.Module):
    """The books of tokens on a device: ids (B, H, W), or (B, Q, H, W) of Q digits, to vectors and back.

    `sizes` has the number of values of each digit, `dim` the dimension of a vector, `combine` is that of `Books`.
    """

    def __init__(self, tables: Sequence[Float[Tensor, "codes dim"]], combine: str, sizes: Sequence[int]):
        super().__init__()
        for number, table in enumerate(tables):
            self.register_buffer(f"table_{number}", table)
        self.combine, self.sizes, self._tables = combine, tuple(sizes), len(tables)
        self.dim = sum(table.shape[1] for table in tables) if combine == "concat" else tables[0].shape[1]

    @classmethod
    def of(cls, codebook: "Codebook | Books | Float[Tensor, 'codes dim']") -> "Codebook":
        """Return the codebook of a table (K, D) on its device, or of the books of a store or tokenizer."""
        if isinstance(codebook, Codebook):
            return codebook
        if isinstance(codebook, Tensor):
            return cls([codebook], "index", index_sizes(len(codebook)))
        return cls([torch.from_numpy(table.copy()) for table in codebook.tables], codebook.combine, codebook.sizes)

    def to_books(self) -> Books:
        """Return the books in memory, float32, as stores hold them."""
        return Books(
            tuple(table.detach().float().cpu().numpy() for table in self.tables), self.combine, self.sizes
        )

    @property
    def planes(self) -> tuple[int, ...]:
        """The axis of the digits in the shape of ids: () for one digit, (Q,) for Q digits."""
        return () if len(self.sizes) == 1 else (len(self.sizes),)

    @property
    def tables(self) -> list[Float[Tensor, "_ _"]]:
        """The tables, float."""
        return [getattr(self, f"table_{number}") for number in range(self._tables)]

    def embed(self, ids: Integer[Tensor, "batch *digits height width"]) -> Float[Tensor, "batch dim height width"]:
        """Return the vectors of the ids as maps, channels-last in memory."""
        if self.combine == "index":
            return embed(self.joined(ids), self.tables[0])
        parts = [embed(ids[:, digit], table) for digit, table in enumerate(self.tables)]
        return torch.cat(parts, dim=1) if self.combine == "concat" else sum(parts[1:], parts[0])

    def nearest(
        self, maps: Float[Tensor, "batch dim height width"], lookup: str = "cosine"
    ) -> Int64[Tensor, "batch *digits height width"]:
        """Return the ids whose vector is nearest to each vector, as the function `nearest` does for each table.

        With "sum", each digit is the nearest row of its table to what the digits before it leave of the vector, as
        residual quantizers choose them.
        """
        if self.combine == "index":
            return self.split(nearest(maps, self.tables[0], lookup))
        if self.combine == "concat":
            parts = maps.split([table.shape[1] for table in self.tables], dim=1)
            ids = [nearest(part, table, lookup) for part, table in zip(parts, self.tables, strict=True)]
            return torch.stack(ids, dim=1)
        rest, ids = maps.float(), []
        for table in self.tables:
            ids.append(nearest(rest, table, lookup))
            rest = rest - embed(ids[-1], table)
        return torch.stack(ids, dim=1)

    def joined(self, ids: Integer[Tensor, "batch *digits height width"]) -> Int64[Tensor, "batch height width"]:
        """Return the rows of the one table of "index" that have these digits.

        Digits of no row, which a network can predict, become those of the last one.
        """
        if len(self.sizes) == 1:
            return ids.long()
        return (ids[:, 0].long() * self.sizes[1] + ids[:, 1]).clamp(max=len(self.tables[0]) - 1)

    def split(self, ids: Int64[Tensor, "batch height width"]) -> Int64[Tensor, "batch *digits height width"]:
        """Return the digits of rows of the one table of "index"."""
        if len(self.sizes) == 1:
            return ids
        return torch.stack([ids.div(self.sizes[1], rounding_mode="floor"), ids % self.sizes[1]], dim=1)

    def extra_repr(self) -> str:
        return f"{self.combine} of {' x '.join(map(str, self.sizes))} values, dimension {self.dim}"


def codebook_fingerprint(codebook: Books | Float[np.ndarray, "codes dim"]) -> str:
    """Return the SHA-256 of a codebook as hex: ids have the same meaning only if their fingerprints are equal."""
    books = Books.of(codebook)
    digest = hashlib.sha256(b"" if books.digits == 1 else f"{books.combine} {books.sizes}".encode())
    for table in books.tables:
        rows = np.ascontiguousarray(table, dtype="<f4")
        digest.update(f"{rows.shape}".encode() + rows.tobytes())
    return digest.hexdigest()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn autocast and TF32 off in a with-block: half precision changes ids (fp16 0.2 % of them, bf16 1.9 %)."""
    if torch.compiler.is_compiling():  # a compiled graph cannot change the TF32 flags
        with torch.autocast(device.type, enabled=False):
            yield
        return
    before = _tf32_settings()
    _set_tf32(("ieee", "ieee") if isinstance(before[0], str) else (False, False))
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _set_tf32(before)


def _tf32_settings() -> tuple:
    """Both settings, by the old names unless the new ones are in use: torch raises an error if they are mixed."""
    try:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


def _set_tf32(settings: tuple) -> None:
    matmul, convolution = settings
    if isinstance(matmul, str):
        torch.backends.cuda.matmul.fp32_precision = matmul
        torch.backends.cudnn.conv.fp32_precision = convolution
    else:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = convolution
