"""What a compiled kernel takes of a multiprocessor."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Resources:
    """One kernel in one configuration, compiled for one target.

    Args:
        kernel: its function's name.
        variant: the configuration, such as "bfloat16 D64 spans".
        target: "sm_90", "gfx942", ...
        registers: a thread.
        spilled_bytes: a thread; of stack and local memory that registers are spilled to, or of spilling instructions.
        shared_bytes: a block, static and dynamic.
        code_bytes: of machine code.
    """

    kernel: str
    variant: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    code_bytes: int


def code_sizes(elf: bytes) -> Iterator[tuple[str, int]]:
    """Name and bytes of each section of machine code in an ELF file: ``.text``, or ``.text.KERNEL`` in a cubin."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + n * size) for n in range(count)]
    strings = sections[names][4]
    for place, _kind, _flags, _address, _offset, length in sections:
        name = elf[strings + place : elf.index(b"\0", strings + place)].decode()
        if name == ".text" or name.startswith(".text."):
            yield name, length
