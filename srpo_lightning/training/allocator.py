"""What the C library does with memory that is freed."""

import ctypes
import sys
from typing import Any

import psutil

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of <malloc.h>
LARGEST = 32 << 20  # bytes; glibc takes no higher threshold (mallopt(3), M_MMAP_THRESHOLD)
KEPT = (1 << 31) - 1  # bytes
SMALLEST = 256 << 10  # bytes; with blocks from 1 MiB on alone, holes between activations still add up
LARGE = 0.1  # of the machine's memory


def keep_freed_memory() -> None:
    """Keep what a step on a CPU frees for the next one, on Linux.

    Otherwise glibc returns activations of some megabytes to the system, or not, by what was freed before. Getting them
    anew, page by page, took a tenth of the demo's update. Blocks above 32 MiB are returned all the same.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, KEPT)


def return_freed_memory(weights: int) -> None:
    """Return what is freed at once, where memory is needed more than time: beside weights of a tenth of the machine's.

    What stays of a block's forward pass lies between what it has freed, and glibc keeps those holes: at FLUX.1's width
    47 MiB of each block. To get 10 MB anew takes some milliseconds, which nobody sees beside products of such matrices.

    Args:
        weights: Bytes of all weights.
    """
    if weights > LARGE * psutil.virtual_memory().total and (mallopt := _of_glibc("mallopt")):
        mallopt(MMAP_THRESHOLD, SMALLEST)


def trim_freed_memory() -> None:
    """Return what has been freed until now, the holes between what lives too, on Linux with glibc (malloc_trim(3))."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def _of_glibc(name: str) -> Any:
    """A function of <malloc.h>; None where the C library has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
