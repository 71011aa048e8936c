"""The allocator of a CPU's tensors."""

import ctypes
import mmap
import random
import sys

MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_MAX = -1, -4  # parameters of glibc's mallopt

HUGE_HEAP = 2**30
"""Bytes at the start of the heap that are in huge pages, which are taken only when they are used."""

PIECES, SMALLEST, LARGEST = 100, 2**10, 2**22
"""Pieces that `shuffle_heap` puts into the heap, and their bytes."""


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep all memory that is freed for the next step, instead of handing it back.

    What is handed back comes again page by page, each with a fault and filled with zeros: a quarter of a training step
    on a CPU, and up to a third of a forward pass, by the layout of the heap. The process stays as large as it ever was.
    No effect without glibc.
    """
    if libc := _libc():
        libc.mallopt(MALLOC_MMAP_MAX, 0)  # large tensors too come from the heap that is kept
        libc.mallopt(MALLOC_TRIM_THRESHOLD, 2**31 - 1)


def use_huge_pages() -> None:
    """Ask that what this process allocates from now on is in pages of 2 MB, for timings: with pages of 4 KB, a
    network's speed depends on where in memory its pages happen to lie, from process to process. To be called after
    `keep_freed_memory`. No effect without glibc, or where the system has no such pages to give.
    """
    libc = _libc()
    if not libc:
        return
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(HUGE_HEAP)
    if start:
        first_page = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(first_page, start + HUGE_HEAP - first_page, mmap.MADV_HUGEPAGE)
        libc.free(start)  # kept as the heap's top, which is handed out next


def shuffle_heap() -> None:
    """Let what this process allocates from now on lie at random places, for timings: by how the addresses of its
    tensors collide in the caches, a network takes some per cent more or less, and a block of many pixels up to a third.
    Processes forked from one would all have the same collisions. No effect without glibc.
    """
    if libc := _libc():
        pieces = [libc.malloc(int(SMALLEST * (LARGEST / SMALLEST) ** random.random())) for _ in range(PIECES)]
        for piece in random.sample(pieces, PIECES // 2):
            libc.free(piece)


def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if not hasattr(libc, 'mallopt'):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc
