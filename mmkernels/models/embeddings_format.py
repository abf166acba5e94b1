"""What the table of an `EmbeddingCache` holds: a header in its schema; for each row a key, a vector and a checksum."""

from __future__ import annotations

import importlib
import json
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FORMAT = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COLUMNS = ["key", "vector", "crc"]
_HEADER = b"mmkernels"  # its place in the schema's metadata
_KEY_BYTES = 32


class Header(NamedTuple):
    """What a table's schema says of all its rows."""

    model_id: str
    dtype: torch.dtype
    normalized: bool
    dim: int
    table: str
    """A random name: a table that takes the place of another has another one. Checksums of rows depend on it."""

    @classmethod
    def of(cls, schema: Any) -> Header:
        """Reads it. Raises ValueError, KeyError or TypeError where the schema is not one of `schema`."""
        text = (schema.metadata or {}).get(_HEADER)
        if text is None:
            raise ValueError("it is a table of something else")
        version, model_id, dtype, normalized, dim, table, crc = json.loads(text)
        if zlib.crc32(json.dumps([version, model_id, dtype, normalized, dim, table]).encode()) != crc:
            raise ValueError("its header has another checksum")
        if version != FORMAT:
            raise ValueError(f"format {version}, where this version of mmkernels reads {FORMAT}")
        header = cls(model_id, DTYPES[dtype], normalized, dim, table)
        if not schema.equals(header.schema()):
            raise ValueError("its columns are not those of a cache")
        return header

    def schema(self) -> Any:
        pa = importlib.import_module("pyarrow")
        values = [FORMAT, self.model_id, str(self.dtype)[6:], self.normalized, self.dim, self.table]
        text = json.dumps([*values, zlib.crc32(json.dumps(values).encode())])
        element = {torch.float32: pa.float32(), torch.float16: pa.float16(), torch.bfloat16: pa.int16()}[self.dtype]
        types = [pa.binary(_KEY_BYTES), pa.list_(element, self.dim), pa.uint32()]
        fields = [pa.field(name, kind, nullable=False) for name, kind in zip(COLUMNS, types)]
        return pa.schema(fields, metadata={_HEADER: text.encode()})

    def to_arrow(self, keys: list[bytes], rows: Tensor) -> Any:
        """Rows ``[n, d]`` as an Arrow table; bfloat16, which Arrow lacks, as its bits."""
        pa = importlib.import_module("pyarrow")
        stored = (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()
        joined = pa.py_buffer(b"".join(keys))
        columns = [
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(_KEY_BYTES), len(keys), [None, joined]),
            pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), self.dim),
            pa.array(self._checksums(keys, stored)),
        ]
        return pa.table(columns, self.schema())

    def from_arrow(self, found: Any, verify: bool) -> tuple[Tensor, np.ndarray]:
        """Returns the rows ``[n, d]`` of an Arrow table, as they are stored, and whether each has its checksum."""
        stored = found["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        stored = np.require(stored, requirements="W").reshape(len(found), self.dim)
        whole = np.ones(len(found), bool)
        if verify:
            whole = found["crc"].to_numpy() == self._checksums(keys_of(found), stored)
        rows = torch.from_numpy(stored)
        return rows.view(torch.bfloat16) if self.dtype == torch.bfloat16 else rows, whole

    def _checksums(self, keys: list[bytes], rows: np.ndarray) -> np.ndarray:
        """CRC-32 of the table's name, a row's key and its bytes, ``[n]`` uint32."""
        view, size, start = memoryview(rows.tobytes()), rows.shape[1] * rows.itemsize, zlib.crc32(self.table.encode())
        crcs = (zlib.crc32(view[n * size : (n + 1) * size], zlib.crc32(key, start)) for n, key in enumerate(keys))
        return np.fromiter(crcs, np.uint32, len(keys))


def numbers_of(found: Any) -> np.ndarray:
    return found["_rowid"].to_numpy().astype(np.int64)


def different_numbers(found: Any) -> np.ndarray:
    """As `numbers_of`; ValueError where two rows have the same one, which no whole manifest gives them."""
    numbers = numbers_of(found)
    if len(np.unique(numbers)) < len(numbers):
        raise ValueError("it gives two rows the same number")
    return numbers


def keys_of(found: Any) -> list[bytes]:
    return [key for chunk in found["key"].chunks for key in _keys(chunk)]


def _keys(chunk: Any) -> list[bytes]:
    data = chunk.buffers()[1][_KEY_BYTES * chunk.offset : _KEY_BYTES * (chunk.offset + len(chunk))].to_pybytes()
    return [data[n : n + _KEY_BYTES] for n in range(0, len(data), _KEY_BYTES)]
