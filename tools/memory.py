"""The allocator of a CPU's tensors."""

import ctypes
import mmap
import sys

MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_MAX = -1, -4  # parameters of glibc's mallopt

HUGE_HEAP = 2**30
"""Bytes at the start of the heap that are in huge pages, which are taken only when they are used."""


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep all memory that is freed for the next step, instead of handing it back.

    What is handed back comes again page by page, each with a fault and filled with zeros: a quarter of a training step
    on a CPU, and up to a third of a forward pass, by the layout of the heap. The process stays as large as it ever was.
    No effect without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        mallopt(MALLOC_MMAP_MAX, 0)  # large tensors too come from the heap that is kept
        mallopt(MALLOC_TRIM_THRESHOLD, 2**31 - 1)


def use_huge_pages() -> None:
    """Ask that what this process allocates from now on is in pages of 2 MB, for timings: with pages of 4 KB, a
    network's speed depends on where in memory its pages happen to lie, from process to process. To be called after
    `keep_freed_memory`. No effect without glibc, or where the system has no such pages to give.
    """
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if not hasattr(libc, 'mallopt'):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(HUGE_HEAP)
    if start:
        first_page = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(first_page, start + HUGE_HEAP - first_page, mmap.MADV_HUGEPAGE)
        libc.free(start)  # kept as the heap's top, which is handed out next
