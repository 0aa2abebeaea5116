import platform
import subprocess
import sys

import psutil
import pytest

from tests.processes import LIMIT_S

PROGRAM = """
import resource, sys
from srpo_lightning.training.allocator import keep_freed_memory, return_freed_memory
if sys.argv[1] != "leave":
    keep_freed_memory()
if sys.argv[1] == "return":
    return_freed_memory(int(sys.argv[2]))
import ctypes
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes, malloc.argtypes = ctypes.c_void_p, [ctypes.c_void_p], [ctypes.c_size_t]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(50):
    blocks = [malloc(9 << 20), malloc(20 << 20)]
    for block in blocks:
        ctypes.memset(block, 1, 9 << 20)
    for block in blocks:
        free(block)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_what_a_step_frees_is_there_for_the_next_without_page_faults():
    def faults(*choice: str) -> int:
        command = [sys.executable, "-c", PROGRAM, *choice]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_S).stdout)

    once = 2 * (9 << 20) // 4096
    assert faults("keep") < 2 * once
    assert faults("leave") > 2 * once
    memory = psutil.virtual_memory().total
    assert faults("return", str(memory // 5)) > 2 * once
    assert faults("return", str(memory // 20)) < 2 * once


HOLES = """
import ctypes, re
from srpo_lightning.training.allocator import keep_freed_memory, trim_freed_memory
keep_freed_memory()
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes, malloc.argtypes = ctypes.c_void_p, [ctypes.c_void_p], [ctypes.c_size_t]
def own_mib():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = own_mib()
large = []
for _ in range(20):
    large.append(malloc(9 << 20))
    malloc(64 << 10)  # lives on behind it
    ctypes.memset(large[-1], 1, 9 << 20)
for block in large:
    free(block)
print(own_mib() - before)
trim_freed_memory()
print(own_mib() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_holes_between_what_lives_are_returned_when_asked():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, timeout=LIMIT_S)
    kept, trimmed = map(float, done.stdout.split())
    assert kept > 20 * 9 * 0.9
    assert trimmed < 20
