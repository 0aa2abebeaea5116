"""Where the time of a training step goes, what torch.compile changes, and what Lightning adds.

python -m benchmarks.step [--geometry small] [--repeats 7] [--compile true] [--steps 20]

  small   the built-in model with the settings of configs/emoji_srpo.yaml
  flux    FLUX.1-dev and HPSv2.1 with random weights and the settings of configs/flux_srpo_lora.yaml; on a CUDA GPU

A step is one micro-batch, optimizer and EMA, with new prompts each time, so that the reward reads new texts. All that
is compared takes turns within one process; times are medians. Model FLOPs are counted by torch.utils.flop_counter on
tensors without memory and without recomputation; the rate that they are held against is that of a product of two square
matrices in the dtype of the step.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from statistics import median, quantiles
from typing import Any, Literal

import torch
from jsonargparse import Namespace, auto_cli
from jsonargparse.typing import NonNegativeInt, PositiveInt

from benchmarks.bare_step import BareStep, load, on_device
from benchmarks.meter import PHASES, by_phase, matrix_rate, model_flops
from benchmarks.through_lightning import lightning_share
from srpo_lightning.config.arguments import read_config
from srpo_lightning.jobs.estimate.options import POLICY
from srpo_lightning.jobs.estimate.prediction import fake_conditions
from srpo_lightning.jobs.estimate.published import local_files
from srpo_lightning.jobs.estimate.units import GIB
from srpo_lightning.phases import BACKWARD, FORWARD, ROLLOUT

CONFIGS = {"small": "configs/emoji_srpo.yaml", "flux": "configs/flux_srpo_lora.yaml"}


@contextmanager
def models(geometry: str) -> Iterator[Namespace]:
    """The configuration, with folders of small files in the place of published models."""
    config = read_config(CONFIGS[geometry])
    with local_files(config):
        yield config


def table(times: list[dict[str, float]], flops: Mapping[str, float], rate: float) -> Iterator[str]:
    """Seconds, share, model FLOPs and utilisation by phase; medians of each."""
    seconds = {phase: median(turn.get(phase, 0.0) for turn in times) for phase in PHASES}
    total = median(sum(turn.values()) for turn in times)
    yield "| phase | seconds | share | model GFLOP | of the matrix rate |"
    yield "|---|---|---|---|---|"
    for phase in PHASES:
        count = flops.get(phase, 0.0)
        used = f"{count / seconds[phase] / rate:.0%}" if count else ""
        yield f"| {phase} | {seconds[phase]:.4f} | {seconds[phase] / total:.1%} | {count / 1e9:.0f} | {used} |"
    count = sum(flops.values())
    yield f"| in all | {total:.4f} | | {count / 1e9:.0f} | {count / total / rate:.0%} |"


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    if len(values) < 2:
        return f"{values[0]:.3f} (one measurement)"
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} (half of {len(values)} between {low:.3f} and {high:.3f})"


def main(
    geometry: Literal["small", "flux"] = "small",
    repeats: PositiveInt = 7,
    compile: bool = True,
    steps: NonNegativeInt = 20,
) -> None:
    """Print what was measured.

    Args:
        geometry: which models.
        repeats: turns of each way that phases are timed in.
        compile: compare with compiled blocks, which takes minutes to make on a CPU.
        steps: pairs of a step through Lightning and a bare one.
    """
    has_gpu = torch.cuda.is_available()
    if geometry == "flux" and not has_gpu:
        print("There is no CUDA GPU here: nothing was measured at the size of FLUX.1-dev.")
        return
    device = torch.device("cuda" if has_gpu else "cpu")
    with models(geometry) as config:
        config[f"{POLICY}.compile"] = compile
        dtype = torch.bfloat16 if config.trainer.precision == "bf16-mixed" else torch.float32
        flops = model_flops(config)
        module = load(config, device, geometry)
        conditions = on_device(fake_conditions(config, module.policy, config.data.batch_size), device)
        as_is = partial(torch.compiler.set_stance, "force_eager")
        ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {"eager": as_is}
        if compile:
            ways["compiled"] = nullcontext
        step = BareStep(module, config, conditions, module.configure_optimizers())
        times, rates = by_phase(step, ways, repeats, partial(matrix_rate, device, dtype))
        name = torch.cuda.get_device_name() if has_gpu else f"CPU, {torch.get_num_threads()} threads"
        print(f"{geometry}: {name}, {config.trainer.precision}, batch {conditions.batch_size}, {repeats} turns")
        print(f"matrix rate, {str(dtype)[6:]}: {spread([rate / 1e9 for rate in rates])} GFLOP/s\n")
        for way, turns in times.items():
            print(f"{way}:\n", *table(turns, flops, median(rates)), sep="\n", end="\n\n")
        if compile:
            for phase in ("step", ROLLOUT, FORWARD, BACKWARD):
                pairs = zip(times["compiled"], times["eager"], strict=True)
                ratios = [of_phase(a, phase) / of_phase(b, phase) for a, b in pairs]
                print(f"compiled over eager, {phase}: {spread(ratios)}")
        if has_gpu:
            print(f"peak: {torch.cuda.max_memory_allocated() / GIB:.2f} GiB")
        if steps:
            del step
            with as_is():
                overheads = lightning_share(module, config, conditions, steps)
            print(f"a step through Lightning over a bare one: {spread([ratio.wall for ratio in overheads])}")
            print(f"the same in processor time: {spread([ratio.cpu for ratio in overheads])}")


def of_phase(seconds: Mapping[str, float], phase: str) -> float:
    return sum(seconds.values()) if phase == "step" else seconds[phase]


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
