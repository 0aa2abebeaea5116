"""Reading features at FLUX.1-dev's size: prompts per second, how long a step waits for them, and memory over time.

python -m benchmarks.data read      [--num_prompts 64] [--num_workers 2] [--step_s 1.0]
python -m benchmarks.data prompts   [--count 1000000]
python -m benchmarks.data shrink

`read` writes noise of the features' size, 4 MB a prompt, which compresses worse than features, and reads it in the
order of training; a step is a sleep.
"""

import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import torch
from jsonargparse import auto_cli
from torch.utils.data import DataLoader

from srpo_lightning.data.dataset import PromptDataset, collate
from srpo_lightning.data.features import FeatureCache
from srpo_lightning.data.order import Order, Segment, StepSampler, Stream
from srpo_lightning.data.prompts import Prompt, PromptSet, read_prompts
from srpo_lightning.policies.flux import FluxTextEncoder

MEGABYTE = 1e6


class RandomEncoder(FluxTextEncoder):
    """Features of FLUX.1-dev's shapes without its encoders."""

    def __init__(self) -> None:
        self.dtype, self.max_sequence_length = torch.bfloat16, 512

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of T5-XXL and CLIP-L."""
        return {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)}

    def description(self) -> dict[str, str | int]:
        """There is one of these only."""
        return {"model": "random", "fingerprint": "random"}

    def encode(self, prompts: list[str]) -> list[dict[str, torch.Tensor]]:
        """Noise."""
        return [{n: torch.randn(s).to(self.dtype) for n, s in self.shapes.items()} for _ in prompts]


def read(
    num_prompts: int = 64, batch_size: int = 1, num_workers: int = 2, step_s: float = 1.0, steps: int = 30
) -> None:
    """Prompts per second, the share of a step that waits, and memory after so many batches and ten times as many."""
    prompts = PromptSet.from_records([Prompt(f"prompt {i}") for i in range(num_prompts)])
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(folder, RandomEncoder())
        seconds = timed(lambda: cache.add(prompts.prompts, 8))
        manifest = cache.open()
        print(
            f"written: {manifest.num_bytes / num_prompts / MEGABYTE:.2f} MB per prompt of "
            f"{cache.item_bytes / MEGABYTE:.2f}, {num_prompts / seconds:.1f} prompts/s"
        )
        stream = batches(prompts, cache, batch_size, num_workers)
        next(stream)
        seconds = timed(lambda: list(islice(stream, steps)) and None)
        print(
            f"read: {steps * batch_size / seconds:.1f} prompts/s; a step of {step_s} s needs {batch_size / step_s:.1f}"
        )
        waited = 0.0
        for _ in range(steps):
            time.sleep(step_s)
            waited += timed(lambda: next(stream) and None)
        print(f"waited: {waited / steps * 1e3:.2f} ms per step, {waited / steps / (step_s + waited / steps):.2%} of it")
        for count in (steps, 10 * steps):
            for _ in range(count if count == steps else count - steps):
                next(stream)
            print(f"memory after {count} batches: {resident():.1f} MB in all processes")
        shutil.rmtree(folder, ignore_errors=True)


def batches(prompts: PromptSet, cache: FeatureCache, batch_size: int, num_workers: int) -> Iterator[object]:
    """In the order of training."""
    order = Order([Stream(1.0, [(np.arange(len(prompts)), 1.0)])], 0, 8192, [Segment(0, batch_size)])
    dataset = PromptDataset([prompts], cache, None, [])
    sampler = StepSampler(order, batch_size)
    return iter(
        DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=partial(collate, ragged=frozenset(), unconditional=None),
            num_workers=num_workers,
        )
    )


def prompts(count: int = 1_000_000) -> None:
    """Seconds and memory for a file of so many prompts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.txt"
        path.write_text("".join(f"a picture of thing number {i} in the evening light\n" for i in range(count)))
        before = resident()
        start = time.process_time()
        found = read_prompts(str(path)).unique()
        seconds = time.process_time() - start
        train, held_out = found.split(0.01)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE
        print(
            f"{count} prompts: {seconds:.1f} s of processor time, {found.table.nbytes / MEGABYTE:.0f} MB kept, peak "
            f"{peak - before:.0f} MB above the start; split into {len(train)} and {len(held_out)}"
        )


def shrink(pretrained: str = "srpo_lightning/assets/emoji-flux") -> None:
    """What lossless compression and 8-bit floats make of features: of the built-in T5, and of noise of T5's shape."""
    texts = read_prompts("srpo_lightning/assets/prompts/train.txt").prompts[:64]
    kinds = {"noise, bfloat16": torch.randn(512, 4096).bfloat16()}
    for dtype in (torch.bfloat16, torch.float32):
        encoded = FluxTextEncoder(pretrained, dtype=dtype).encode(texts)
        kinds[f"built-in T5, {str(dtype).removeprefix('torch.')}"] = torch.stack([f["prompt_embeds"] for f in encoded])
    zstd = pa.Codec("zstd", compression_level=1)
    print(f"{'of the bytes':28}{'zstd':>8}{'split + zstd':>15}{'fp8 + zstd':>12}{'fp8 error':>11}")
    for name, tensor in kinds.items():
        elements = tensor.contiguous().view(torch.uint8).reshape(-1, tensor.element_size())
        raw = elements.numpy().tobytes()
        scale = tensor.float().abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        small = (tensor.float() / scale).to(torch.float8_e4m3fn)
        error = (small.float() * scale - tensor.float()).norm() / tensor.float().norm()
        sizes = [
            zstd.compress(own)
            for own in (raw, elements.T.contiguous().numpy().tobytes(), small.view(torch.uint8).numpy().tobytes())
        ]
        print(
            f"{name:28}"
            + "".join(f"{len(s) / len(raw):>{w}.3f}" for s, w in zip(sizes, (8, 15, 12), strict=True))
            + f"{error:>11.4f}"
        )


def resident() -> float:
    """Megabytes of this process and its workers, without the pages of files that they share."""
    own = psutil.Process()
    return float(sum(p.memory_full_info().uss for p in (own, *own.children(recursive=True))) / MEGABYTE)


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    auto_cli([read, prompts, shrink], as_positional=False)
