"""Makes the process' resident memory mean the memory in use, where the C library is glibc.

glibc keeps most of what a program frees for later, and reuses it badly (before 2.38 an aligned block, as every tensor
is, seldom fits where an equal one was freed). Four tensors of 20 MB, each freed before the next, may take 60 MB.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_SMALL, _LARGE = 2**16, 2**25
_IS_MMAPPED = 2  # a flag in the size that stands before a block


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, every block of 64 KiB and more is taken from the kernel afresh and given back as soon as it is freed.

    Before, what is free already goes back to the kernel; its place in the heap is filled with blocks that nobody
    touches, which take no memory, so that none of it is used again. Afterwards blocks of up to 32 MiB are kept for
    reuse, which is where glibc's own rule ends up once a block of that size was freed. Without glibc this does nothing.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _SMALL)
    libc.malloc_trim(0)
    fillers = _fill_holes(libc)
    try:
        yield
    finally:
        for filler in fillers:
            libc.free(filler)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)


def _fill_holes(libc: ctypes.CDLL) -> list[int]:
    fillers = []
    size = _LARGE
    while size >= _SMALL:
        block = libc.malloc(size)
        if ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & _IS_MMAPPED:
            libc.free(block)  # there is no hole of this size any more
            size //= 2
        else:
            fillers.append(block)
    return fillers


@cache
def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    return libc
