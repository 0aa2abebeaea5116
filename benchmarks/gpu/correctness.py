"""Whether a training step on the GPU computes what the CPU computes, with every attention kernel.

A stand-in of FLUX.1-dev with one block of each kind, at 256 x 256 and with all 512 text tokens: the kernels meet the
shapes of heads that they meet at full size. The reward is the built-in one, which has learned something. The step is
that of the recipe, with a rollout of two steps.

Reference: the CPU in float32. The GPU in float32 must be as near as FLOAT32 says. In bfloat16 plain attention, of
products of matrices and a softmax, shows what rounding does, and must be as near as MOST says: a gradient that points
elsewhere is far above. Every other kernel may be TIMES as far as plain attention. The CPU computes nothing in bfloat16,
for which many processors have no instructions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace

from benchmarks.bare_step import load
from benchmarks.gpu.isolated import first_line
from benchmarks.gpu.one_step import NUMBERS, Step, differences, make_step
from benchmarks.gpu.recipes import built_in_reward, settings_of
from benchmarks.gpu.scale import Scale, compare_in_float32, free_cached
from benchmarks.gpu.stand_ins import flux_stand_in
from srpo_lightning.jobs.estimate.options import POLICY
from srpo_lightning.policies.adapters import Lora
from srpo_lightning.policies.parallel import ATTENTION, check_attention

ADAPTER = Namespace(**vars(Lora(rank=16)))
TRAINED: Mapping[str, dict[str, object]] = {
    "all weights": {f"{POLICY}.adapter": None, f"{POLICY}.quantize": "none"},
    "LoRA": {f"{POLICY}.adapter": ADAPTER, f"{POLICY}.quantize": "none"},
    "QLoRA": {f"{POLICY}.adapter": ADAPTER, f"{POLICY}.quantize": "nf4"},
}
"""What is trained."""

FLOAT32 = {"loss": 1e-3, "gradient": 0.01, "update": 0.2, "transformer alone": 2e-3, "worst tensor": 0.02}
LEAST = {"loss": 0.01, "gradient": 0.02, "update": 0.2, "transformer alone": 0.02, "worst tensor": 0.04}
TIMES = 2.0
MOST = {"loss": 0.1, "gradient": 0.5, "update": 1.0, "transformer alone": 0.15, "worst tensor": 0.4}
"""Tolerances, LEAST being those of a kernel that is compared with an exact one.

The first step of AdamW is the sign of the gradient, so that updates turn where gradients are near 0.
"""

PLAIN = "_native_math"


class Way(NamedTuple):
    """How a step is computed.

    Args:
        trained: Name in TRAINED.
        numbers: Numbers that it is computed in.
        attention: Attention kernel; native is torch's choice.
    """

    trained: str
    numbers: str
    attention: str = "native"


@contextmanager
def configuration(way: Way, scale: Scale) -> Iterator[Namespace]:
    """The recipe's, on the stand-in."""
    is_mixed = way.numbers == "bfloat16"
    weights = "bfloat16" if is_mixed and way.trained != "all weights" else "float32"
    side = 64 if scale.is_small else 256
    changes = {
        **TRAINED[way.trained],
        f"{POLICY}.pretrained": flux_stand_in(scale, blocks=1),
        f"{POLICY}.dtype": weights,
        f"{POLICY}.vae_dtype": way.numbers,
        f"{POLICY}.exact_conditioning": True,  # or bfloat16 is told another noise level
        "trainer.precision": "bf16-mixed" if is_mixed else "32-true",
        "data.text_dtype": way.numbers if is_mixed else "float32",
        "model.objective.init_args.num_rollout_steps": 2,
        "model.reward": built_in_reward(),
    }
    with settings_of("LoRA", scale, changes) as config:
        config[f"{POLICY}.height"] = config[f"{POLICY}.width"] = side
        yield config


@contextmanager
def steps(way: Way, scale: Scale, device: torch.device) -> Iterator[Callable[[str], Step]]:
    """A function from an attention kernel to the step with it; models are read once, each step has their weights."""
    with configuration(way, scale) as config:
        module = load(config, device, "small")
        start = [(parameter, parameter.detach().clone()) for _, parameter in module.trainable_parameters()]

        def step(attention: str) -> Step:
            for parameter, own in start:
                parameter.data.copy_(own)
            module.zero_grad()
            return make_step(module, config, attention)

        yield step


def correctness(scale: Scale, attention: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Compare steps on the device with those on the CPU: eager, and with each attention kernel.

    Args:
        scale: Where and how large.
        attention: Attention kernels; None: all that are installed.

    Yields:
        `rows`, one for each way so far; at last `passed`: whether all but kernels that do not run are within their
        tolerances.
    """
    compare_in_float32()
    names = installed() if attention is None else attention
    rows: list[dict[str, Any]] = []
    for trained in TRAINED:
        for found in rows_of(trained, names if trained != "all weights" else ["native"], scale):
            rows.append(found)
            yield {"rows": rows} | ({"passed": False} if found["passed"] is False else {})
    yield {"passed": all(found["passed"] for found in rows if found["passed"] is not None)}


def cudnn_attention(scale: Scale, trained: str) -> dict[str, Any]:
    """The same of cuDNN's attention, which no run uses: whether that is still wrong."""
    return {"rows": list(bfloat16_rows(trained, ["_native_cudnn"], scale, reference_of(trained, scale)))}


def reference_of(trained: str, scale: Scale) -> Step:
    """The CPU's."""
    with steps(Way(trained, "float32"), scale, torch.device("cpu")) as step:
        return step("native")


def rows_of(trained: str, names: Sequence[str], scale: Scale) -> Iterator[dict[str, Any]]:
    """The rows of what is trained: in float32, then in bfloat16; of a model that does not load, one that says why."""
    try:
        reference = reference_of(trained, scale)
        yield float32_row(trained, scale, reference)
        yield from bfloat16_rows(trained, names, scale, reference)
    except Exception as error:  # the next is tried all the same
        yield {**Way(trained, "any")._asdict(), "allowed": dict(MOST), "error": first_line(error), "passed": False}


def float32_row(trained: str, scale: Scale, reference: Step) -> dict[str, Any]:
    """The row of a step in float32, whose model is gone afterwards."""
    way = Way(trained, "float32")
    free_cached(scale.torch_device)
    with steps(way, scale, scale.torch_device) as step:
        return row(way, step, reference, FLOAT32)


def bfloat16_rows(trained: str, names: Sequence[str], scale: Scale, reference: Step) -> Iterator[dict[str, Any]]:
    """Plain attention's, and those of other kernels."""
    way = Way(trained, "bfloat16", PLAIN)
    free_cached(scale.torch_device)
    with steps(way, scale, scale.torch_device) as step:
        yield (plain := row(way, step, reference, MOST))
        rounding = plain["measured"] if plain["passed"] else {}
        allowed = {name: min(max(TIMES * rounding.get(name, most), LEAST[name]), most) for name, most in MOST.items()}
        for name in names:
            if name != PLAIN:
                yield row(way._replace(attention=name), step, reference, allowed)


def row(way: Way, step: Callable[[str], Step], reference: Step, allowed: Mapping[str, float]) -> dict[str, Any]:
    """A way's differences, their tolerances, and whether it passed; None: the kernel does not run here."""
    found: dict[str, Any] = {**way._asdict(), "allowed": dict(allowed)}
    try:
        measured = differences(step(way.attention), reference)
    except Exception as error:  # of compiled code there are many kinds
        return found | {"error": first_line(error), "passed": False if way.attention == "native" else None}
    passed = all(measured[name] <= allowed[name] for name in NUMBERS)  # a comparison with NaN is false
    return found | {"measured": measured, "passed": passed}


def installed() -> list[str]:
    """The attention kernels that are here."""

    def is_here(name: str) -> bool:
        try:
            check_attention(name)
        except ValueError:
            return False
        return True

    return list(filter(is_here, ATTENTION))
