"""What the table of an `EmbeddingCache` holds: a header in its schema; for each row a key, a vector and a checksum."""

from __future__ import annotations

import json
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch

FORMAT = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HEADER = b"mmkernels"  # its place in the schema's metadata
KEY_BYTES = 32


class Header(NamedTuple):
    """What a table's schema says of all its rows."""

    model_id: str
    dtype: torch.dtype
    normalized: bool
    dim: int
    table: str
    """A random name: a table that takes the place of another has another one."""

    def to_json(self) -> str:
        values = [FORMAT, self.model_id, str(self.dtype)[6:], self.normalized, self.dim, self.table]
        return json.dumps([*values, zlib.crc32(json.dumps(values).encode())])

    @classmethod
    def from_json(cls, text: bytes) -> Header:
        version, model_id, dtype, normalized, dim, table, crc = json.loads(text)
        if zlib.crc32(json.dumps([version, model_id, dtype, normalized, dim, table]).encode()) != crc:
            raise ValueError("another checksum")
        if version != FORMAT:
            raise ValueError(f"format {version}, where this version of mmkernels reads {FORMAT}")
        return cls(model_id, DTYPES[dtype], normalized, dim, table)


def checksums(keys: bytes, rows: np.ndarray) -> np.ndarray:
    """CRC-32 of each row's key and bytes, ``[n]`` uint32."""
    view, size = memoryview(rows.tobytes()), rows.shape[1] * rows.itemsize
    return np.fromiter(
        (
            zlib.crc32(view[n * size : (n + 1) * size], zlib.crc32(keys[KEY_BYTES * n : KEY_BYTES * (n + 1)]))
            for n in range(len(rows))
        ),
        np.uint32,
        len(rows),
    )


def numbers_of(found: Any) -> np.ndarray:
    return found["_rowid"].to_numpy().astype(np.int64)


def keys_of(found: Any) -> bytes:
    """The keys of an Arrow table, one after the other."""
    return b"".join(
        chunk.buffers()[1][KEY_BYTES * chunk.offset : KEY_BYTES * (chunk.offset + len(chunk))].to_pybytes()
        for chunk in found["key"].chunks
    )
