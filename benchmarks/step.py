"""Where the time of a training step goes, what torch.compile changes, and what Lightning adds.

python -m benchmarks.step [--geometry small] [--repeats 7] [--compile true] [--steps 20]

  small   the built-in model with the settings of configs/emoji_srpo.yaml
  flux    FLUX.1-dev and HPSv2.1 with random weights and the settings of configs/flux_srpo_lora.yaml; on a CUDA GPU

A step is one micro-batch, optimizer and EMA, with new prompts each time, so that the reward reads new texts. All that
is compared takes turns within one process; times are medians. Model FLOPs are counted by torch.utils.flop_counter on
tensors without memory and without recomputation; the rate that they are held against is that of a product of two square
matrices in the dtype of the step.
"""

import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse import Namespace, auto_cli
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks import EMA
from srpo_lightning.config.arguments import new_module, read_config
from srpo_lightning.config.classes import of_class
from srpo_lightning.files.quiet import QUIET
from srpo_lightning.jobs.estimate.job import POLICY, local_files
from srpo_lightning.jobs.estimate.memory import GIB, MemoryTracker
from srpo_lightning.jobs.estimate.prediction import eager, fake_conditions, make_fake, quiet, without_weights
from srpo_lightning.jobs.estimate.step import (
    AVERAGING,
    BACKWARD,
    DECODE,
    FORWARD,
    REWARD,
    ROLLOUT,
    STEP,
    micro_batch,
    phases,
)
from srpo_lightning.module import SRPOModule
from srpo_lightning.training.timing import now, seconds_between

CONFIGS = {"small": "configs/emoji_srpo.yaml", "flux": "configs/flux_srpo_lora.yaml"}
PHASES = (ROLLOUT, FORWARD, DECODE, REWARD, BACKWARD, STEP, AVERAGING)

ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
"""What torch's counter does not know."""


class Meter:
    """How much of something each phase takes: set `phase` as a step goes on.

    Args:
        read: how the meter stands.
        difference: how much is between two readings.
    """

    def __init__(self, read: Callable[[], Any], difference: Callable[[Any, Any], float]) -> None:
        self.read = read
        self.difference = difference
        self._readings: list[tuple[str, Any]] = []

    @property
    def phase(self) -> str:
        """The running one."""
        return self._readings[-1][0] if self._readings else ""

    @phase.setter
    def phase(self, name: str) -> None:
        self._readings.append((name, self.read()))

    def take(self) -> dict[str, float]:
        """The sums by phase since the last call."""
        self.phase = ""
        sums: dict[str, float] = defaultdict(float)
        for (name, start), (_, end) in zip(self._readings, self._readings[1:], strict=False):
            sums[name] += self.difference(start, end)
        self._readings = []
        return dict(sums)


class BareStep:
    """A training step by the module's own objective, reward and optimizer, without Lightning."""

    def __init__(self, module: SRPOModule, config: Namespace, conditions: Conditions, optimizer: Optimizer) -> None:
        self.module = module
        self.trainer = config.trainer
        self.conditions = conditions
        self.optimizer = optimizer
        self.parameters = [p for _, p in module.trainable_parameters()]
        self.accumulates = False
        """Whether the gradients of the micro-batch before stay, and this one's are added."""
        self.ema = next((EMA(**vars(own.init_args)) for own in of_class(config.trainer.callbacks, EMA)), None)
        self.progress: Any = SimpleNamespace(global_step=0)
        if self.ema:
            self.ema.on_fit_start(self.progress, module)

    def __call__(self, meter: Any) -> None:
        """Make one; `meter` learns the phases."""
        loss = micro_batch(self.module, fresh(self.conditions, self.module.micro_step), self.trainer.precision, meter)
        self.module.micro_step += 1
        if not self.accumulates:
            self.optimizer.zero_grad()
        meter.phase = BACKWARD
        loss.backward()
        meter.phase = STEP
        if torch.nn.utils.clip_grad_norm_(self.parameters, self.trainer.gradient_clip_val or torch.inf).isfinite():
            self.optimizer.step()
        meter.phase = AVERAGING
        self.progress.global_step += 1
        if self.ema:
            self.ema.on_train_batch_end(self.progress, self.module, None, self.conditions, 0)


def fresh(conditions: Conditions, step: int) -> Conditions:
    """The batch with prompts that the reward has not read yet."""
    return conditions._replace(prompts=[f"prompt {step} {i}" for i in range(conditions.batch_size)])


def on_device(conditions: Conditions, device: torch.device) -> Conditions:
    """The same batch there."""
    moved: Conditions = tree_map_only(Tensor, lambda tensor: tensor.to(device), conditions)
    return moved


def load(config: Namespace, device: torch.device, geometry: str) -> SRPOModule:
    """The configured module; of FLUX.1 the architecture alone is there."""
    module = new_module(config)
    with quiet(), without_weights(str(device)) if geometry == "flux" else nullcontext():
        module.configure_model()
    return module.to(device)


def model_flops(config: Namespace) -> Mapping[str, float]:
    """FLOPs of a step by phase."""
    config = config.clone()
    eager(config)
    config[f"{POLICY}.gradient_checkpointing"] = config[f"{POLICY}.vae_checkpointing"] = False
    module = new_module(config)
    with quiet(), without_weights():
        module.configure_model()
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker("", {}):
        make_fake(module)
        conditions = fake_conditions(config, module.policy, config.data.batch_size)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
            meter = Meter(counter.get_total_flops, lambda start, end: end - start)
            with phases(module, meter):
                loss = micro_batch(module, conditions, config.trainer.precision, meter)
                meter.phase = BACKWARD
                loss.backward()
            return meter.take()


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOPs per second of a product of square matrices, large ones unless a size is given."""
    turns = 10 if device.type == "cuda" else 5
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    start = now(device)
    for _ in range(turns):
        a @ b
    return turns * 2 * size**3 / seconds_between(start, now(device))


def by_phase(
    step: BareStep,
    ways: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    repeats: int,
    rate: Callable[[], float],
) -> tuple[dict[str, list[dict[str, float]]], list[float]]:
    """Seconds of each phase, by way and turn, and the matrix rates in between."""
    device = step.module.device
    clock = Meter(partial(now, device), seconds_between)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    rates = []
    for turn in range(-2, repeats):  # two warm up: the second batch size makes sizes symbols
        for name, way in ways.items():
            with way(), phases(step.module, clock):
                step(clock)
            seconds = clock.take()
            if turn >= 0:
                times[name].append(seconds)
        rates.append(rate())
    return times, rates


class Spent(NamedTuple):
    """Seconds by the clock, and of processors; other programs on the machine change the second less."""

    wall: float
    cpu: float

    @classmethod
    def since(cls, start: "Spent") -> "Spent":
        """From then to now; since nothing, where the clocks stand."""
        return cls(time.perf_counter() - start.wall, time.process_time() - start.cpu)


NOTHING = Spent(0, 0)


class TakingTurns(Dataset[Conditions]):
    """Batches for Lightning, a bare step being made before each is handed out; both kinds of step are timed.

    Lightning's lasts from one batch to its asking for the next: loop, hooks, callbacks, logging and loading are in it.
    """

    def __init__(self, conditions: Conditions, num_steps: int) -> None:
        self.conditions = conditions
        self.num_steps = num_steps
        self.make_bare_step: Callable[[], None] = lambda: None
        self.bare: list[Spent] = []
        self.lightning: list[Spent] = []
        self._handed_over = NOTHING

    def __len__(self) -> int:
        return self.num_steps + 1

    def __getitem__(self, index: int) -> Conditions:
        synchronize(self.conditions.device)
        if index:
            self.lightning.append(Spent.since(self._handed_over))
        start = Spent.since(NOTHING)
        self.make_bare_step()
        synchronize(self.conditions.device)
        self.bare.append(Spent.since(start))
        self._handed_over = Spent.since(NOTHING)
        return fresh(self.conditions, -index)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def lightning_share(module: SRPOModule, config: Namespace, conditions: Conditions, num_steps: int) -> list[Spent]:
    """What a step through Trainer.fit takes over what a bare one does, pair by pair."""
    turns = TakingTurns(conditions, num_steps)
    emas = [EMA(**vars(own.init_args)) for own in of_class(config.trainer.callbacks, EMA)]
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            accelerator=conditions.device.type,
            devices=1,
            max_steps=num_steps + 1,
            precision=config.trainer.precision,
            gradient_clip_val=config.trainer.gradient_clip_val,
            log_every_n_steps=config.trainer.log_every_n_steps,
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[*emas, TQDMProgressBar(refresh_rate=10)],
        )
        nothing: Any = SimpleNamespace(phase="")

        def first_bare_step() -> None:
            step = BareStep(module, config, conditions, trainer.optimizers[0])
            turns.make_bare_step = partial(step, nothing)
            turns.make_bare_step()

        turns.make_bare_step = first_bare_step
        trainer.fit(module, DataLoader(turns, batch_size=None, shuffle=False))
    pairs = zip(turns.lightning[1:], turns.bare[1:], strict=False)
    return [Spent(ours.wall / bare.wall, ours.cpu / bare.cpu) for ours, bare in pairs]


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
