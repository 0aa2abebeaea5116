"""What the C library does with memory that is freed."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of <malloc.h>
LARGEST = 32 << 20  # bytes; glibc takes no higher threshold (mallopt(3), M_MMAP_THRESHOLD)
KEPT = (1 << 31) - 1  # bytes


def keep_freed_memory() -> None:
    """Keep what a step on a CPU frees for the next one, on Linux.

    Otherwise glibc returns activations of some megabytes to the system, or not, by what was freed before. Getting them
    anew, page by page, took a tenth of the demo's update. Blocks above 32 MiB are returned all the same.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, KEPT)
