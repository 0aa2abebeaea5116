import time

import torch

from srpo_lightning.training.timing import now, seconds_between


def test_moments_of_a_cpu_are_as_far_apart_as_the_host_says():
    before = time.perf_counter()
    start = now(torch.device("cpu"))
    time.sleep(0.02)
    end = now(torch.device("cpu"))
    assert 0.02 <= seconds_between(start, end) <= time.perf_counter() - before
