"""What a training step at FLUX.1-dev's size takes of this machine's GPU, beside what `estimate` predicts.

python -m benchmarks.gpu [--parts [memory,speed]] [--cases [LoRA]] [--output gpu.json]

  memory         peaks by phase of each recipe, predicted and measured
  speed          seconds, model FLOPs and utilisation by phase of the LoRA recipe
  compiled       the same with compiled blocks
  kernels        the transformer's times under each attention kernel
  checkpointing  its times and its memory with and without recomputing blocks
  optimizers     AdamW by several libraries, on weights on the GPU

Weights are random and made on the GPU; nothing is downloaded. Each part runs alone in a process, with a time limit: one
that fails leaves the others alone. The whole takes about ten minutes on an H100.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt

from benchmarks import gpu_parts
from benchmarks.gpu_parts import CASES
from benchmarks.step import table
from srpo_lightning.jobs.estimate.memory import GIB

CONTEXT = get_context("spawn")  # bitsandbytes uses the GPU when it is imported: no process can inherit that

PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "speed": ("speed", {}),
    "compiled": ("speed", {"compile": True}),
    "kernels": ("kernels", {}),
    "checkpointing": ("checkpointing", {}),
    "optimizers": ("optimizers", {}),
}
"""The parts beside memory: their functions and arguments."""

Part = Literal["memory", "speed", "compiled", "kernels", "checkpointing", "optimizers"]


def alone(function: str, limit_s: float, **arguments: Any) -> dict[str, Any]:
    """What a function of gpu_parts returns, run in a process of its own; its error, if it has none or takes longer."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(limit_s) else {"error": f"no result within {limit_s:.0f} s"}
    except EOFError:
        result = {"error": "the process ended without a result"}
    process.kill()
    process.join()
    return dict(result)


def answer(sender: Connection, function: str, arguments: dict[str, Any]) -> None:
    """Send the result, or the error."""
    try:
        sender.send(getattr(gpu_parts, function)(**arguments))
    except BaseException as error:
        sender.send({"error": f"{type(error).__name__}: {error}"})
        raise


def in_gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def memory_table(predicted: Mapping[str, int], measured: Mapping[str, Any]) -> Iterator[str]:
    """Peaks by phase."""
    yield "| phase | predicted GiB | measured GiB | predicted / measured |"
    yield "|---|---|---|---|"
    peaks = measured.get("peaks", {})
    for phase, size in predicted.items():
        found = peaks.get(phase)
        yield f"| {phase} | {in_gib(size)} | " + (f"{in_gib(found)} | {size / found:.3f} |" if found else " | |")


def summary(predicted: Mapping[str, int], measured: Mapping[str, Any]) -> str:
    """One row: the highest peak, what the allocator took for it, and all that is in use on the device."""
    if "peaks" not in measured:
        return f"{in_gib(max(predicted.values()))} | {measured['error']} | | | |"
    peak, most = max(measured["peaks"].values(), default=0), max(predicted.values(), default=0)
    found = f"{in_gib(peak)} | {most / peak:.3f}" if peak else " | "
    found = measured.get("out of memory", found) + (" |" if "out of memory" in measured else "")
    return f"{in_gib(most)} | {found} | {in_gib(measured['reserved'])} | {in_gib(measured['used'])} |"


def times_table(found: Mapping[str, Any], columns: Mapping[str, float]) -> Iterator[str]:
    """Rows of numbers; `columns` by name have the unit that their numbers are divided by."""
    yield "| | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, own in found.items():
        if isinstance(own, dict):
            cells = [f"{own[c] / unit:.4g}" if c in own else own.get("error", "") for c, unit in columns.items()]
            yield f"| {name} | " + " | ".join(cells) + " |"


def tables(part: str, found: Mapping[str, Any]) -> Iterator[str]:
    """What is printed of a part."""
    if "error" in found:
        yield str(found["error"])
    elif part in ("speed", "compiled"):
        rate = median(found["rates"])
        yield f"matrix rate {rate / 1e12:.0f} TFLOP/s; the first step took {found['first step']:.0f} s"
        yield from table(found["seconds"], found["flops"], rate)
    elif part == "kernels":
        yield from times_table(found, {"rollout step": 1, "trained step": 1, "peak": GIB})
    elif part == "checkpointing":
        rows = {f"{side}, {way}": own for side in found for way, own in found[side].items()}
        yield from times_table(rows, {"trained step": 1, "peak": GIB})
    else:
        columns = {"compile": 1, "seconds": 1, "states": GIB, "meanwhile": GIB, "distance": 1}
        yield f"{found['numbers'] / 1e6:.0f} million numbers; seconds and GiB"
        yield from times_table(found, columns)


def main(
    parts: list[Part] | None = None,
    cases: list[str] | None = None,
    output: Path | None = None,
    limit_s: PositiveInt = 300,
) -> None:
    """Measure and print tables.

    Args:
        parts: what to measure; null is everything.
        cases: recipes whose memory is measured, by their names in gpu_parts.CASES; null is all of them.
        output: a file for all numbers, as JSON.
        limit_s: seconds for each part, and for each recipe of `memory`.
    """
    if not torch.cuda.is_available():
        print("There is no CUDA GPU here: nothing was measured.")
        return
    asked = parts or ["memory", *PARTS]
    names = list(cases or CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise ValueError(f"cases has {', '.join(unknown)}: choose from {', '.join(CASES)}")
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}, diffusers {version('diffusers')}", flush=True)
    results: dict[str, Any] = {}
    if "memory" in asked:
        measure_memory(names, limit_s, results)
    for part in (part for part in PARTS if part in asked):
        function, arguments = PARTS[part]
        results[part] = alone(function, limit_s, **arguments)
        print(f"\n## {part}\n", *tables(part, results[part]), sep="\n", flush=True)
    if output is not None:
        output.write_text(json.dumps(results, indent=1))


def measure_memory(names: list[str], limit_s: float, results: dict[str, Any]) -> None:
    """Predict on the CPU while the GPU measures, and print both."""
    rows = []
    with ProcessPoolExecutor(2, mp_context=CONTEXT) as pool:
        waiting: dict[str, Future[dict[str, int]]] = {n: pool.submit(gpu_parts.prediction, n) for n in names}
        for name in names:
            measured = alone("memory", limit_s, case=name)
            predicted = waiting[name].result()
            results[name] = {"predicted": predicted, "measured": measured}
            print(f"\n## {name}\n", *memory_table(predicted, measured), sep="\n", flush=True)
            rows.append(f"| {name} | {summary(predicted, measured)}")
    print("\n| | predicted GiB | measured GiB | ratio | reserved GiB | in use GiB |\n|---|---|---|---|---|---|")
    print(*rows, sep="\n", flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
