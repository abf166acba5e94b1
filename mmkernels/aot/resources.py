"""What a compiled kernel takes of a multiprocessor."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple


class Usage(NamedTuple):
    """What one compiled kernel takes.

    Args:
        registers: of a thread.
        spilled_bytes: of a thread: of stack and local memory, which registers are spilled to, or of what spilling
            instructions move.
        shared_bytes: of a block, static and dynamic.
        code_bytes: of machine code.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    code_bytes: int

    def __str__(self) -> str:
        return f"{self.registers}/{self.spilled_bytes}/{self.shared_bytes / 1024:.0f}/{self.code_bytes / 1024:.0f}"


class Row(NamedTuple):
    """One kernel in one configuration, compiled for one target.

    Args:
        op: whose plan asks for it.
        kernel: its function's name.
        variant: the configuration, such as "bfloat16 D64 spans training".
        target: "sm_90", "gfx942", ...
    """

    op: str
    kernel: str
    variant: str
    target: str
    usage: Usage

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.variant}, {self.target}"


def code_sizes(elf: bytes) -> Iterator[tuple[str, int]]:
    """Returns name and bytes of each section of machine code of an ELF file: ``.text``; in a cubin ``.text.KERNEL``."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + n * size) for n in range(count)]
    strings = sections[names][4]
    for name_offset, _kind, _flags, _address, _offset, length in sections:
        begin = strings + name_offset
        name = elf[begin : elf.index(b"\0", begin)].decode()
        if name == ".text" or name.startswith(".text."):
            yield name, length
