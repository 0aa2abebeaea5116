"""The forms in which a model can be trained, and the first of them that fits, by `estimate`'s own prediction."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from jsonargparse import Namespace

from srpo_lightning.config.arguments import choose_strategy, new_policy, read_config
from srpo_lightning.config.loops import check_loops
from srpo_lightning.jobs.estimate.host import machine_memory
from srpo_lightning.jobs.estimate.prediction import quiet
from srpo_lightning.jobs.estimate.published import local_files
from srpo_lightning.jobs.estimate.room import predicted_peaks
from srpo_lightning.jobs.estimate.units import GIB, parse_bytes
from srpo_lightning.jobs.init.comments import commented
from srpo_lightning.jobs.init.settings import Draft, draft, files_of
from srpo_lightning.jobs.init.wishes import BUILTIN, Wishes, models
from srpo_lightning.policies.flow_policy import FlowPolicy

KEPT_FREE = parse_bytes("2GiB")
"""Of a GPU, for what `estimate` does not count; its default as well."""

SHARE_OF_MACHINE = 0.9
"""Of the machine's own memory, which other programs use as well."""


class Form(NamedTuple):
    """A form of training.

    Args:
        method: Method that it belongs to: full, lora or qlora.
        words: What is trained and how, in words.
        recipes: Recipes that it is made of.
        on_several: Whether it is for several GPUs, or for one; None for both.
        bytes_per_weight: Bytes of a GPU's memory that each weight of the transformer takes at least, on all GPUs
            together; those of several copies count once.
    """

    method: str
    words: str
    recipes: tuple[str, ...]
    on_several: bool | None
    bytes_per_weight: float


FORMS = (
    Form("full", "all weights, divided over the GPUs", ("flux_srpo",), True, 16),
    Form("full", "all weights, optimizer states in 8 bits", ("flux_srpo_1gpu",), False, 6),
    Form("lora", "LoRA", ("flux_srpo_lora",), None, 2),
    Form("qlora", "LoRA beside weights in 4 bits (QLoRA)", ("flux_srpo_qlora",), None, 0.5),
    Form("lora", "LoRA, weights in the machine's memory", ("flux_srpo_lora", "forms/host_offload"), False, 0),
)
"""In the order in which they are tried: what trains most weights first, what is slow last."""

OF_BUILTIN = Form("full", "all weights", ("emoji_demo",), None, 0)


class Prediction(NamedTuple):
    """A form of a configuration, and what it takes.

    Args:
        form: Form that is predicted.
        draft: Settings of its configuration.
        peak: Bytes of each GPU, or of the machine where there is none.
        host: Bytes of the machine beside GPUs.
        is_bound: Whether `peak` is no prediction but what the weights alone take.
    """

    form: Form
    draft: Draft
    peak: int
    host: int
    is_bound: bool


def fitting(wishes: Wishes, host_memory: int | None) -> Prediction:
    """The first form that fits.

    Args:
        wishes: What is wished for.
        host_memory: Bytes of the machine's own memory; None: not known.

    Raises:
        ValueError: if none fits, naming the nearest that would.
    """
    if wishes.model == BUILTIN:
        return _builtin(wishes)
    possible = [form for form in FORMS if form.on_several in (None, wishes.gpus > 1)]
    own = [form for form in possible if wishes.method in ("auto", form.method)]
    tried = []
    for found in predictions(own, wishes):
        if fits(found, wishes, host_memory):
            return found
        tried.append(found)
    others = predictions([form for form in possible if form not in own], wishes)
    other = next((found for found in others if fits(found, wishes, host_memory)), None)
    raise ValueError(refusal(wishes, tried, other, host_memory))


def predictions(forms: list[Form], wishes: Wishes) -> Iterator[Prediction]:
    """What forms take, one by one; of those whose weights alone are too large no more is asked."""
    assert wishes.gpu_memory is not None
    for form in forms:
        own = draft(files_of(form.recipes, wishes.model), wishes)
        settings = read(own)
        at_least = int(form.bytes_per_weight * num_weights(settings, wishes))
        at_least //= wishes.gpus if form.on_several else 1
        if at_least > wishes.gpu_memory - KEPT_FREE:
            yield Prediction(form, own, at_least, 0, is_bound=True)
        else:
            print(f"predicting the memory of: {form.words} ...", flush=True)
            yield Prediction(form, own, *peaks(settings, wishes), is_bound=False)


def read(own: Draft) -> Namespace:
    """Settings as `fit` reads them.

    Raises:
        ValueError: if `fit` would not take them.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder, "init.yaml")
        path.write_text(commented(own.settings, own.comments), encoding="utf-8")
        settings = read_config(str(path))
    check_loops(settings.trainer, "fit")
    return settings


def peaks(settings: Namespace, wishes: Wishes) -> tuple[int, int]:
    """Bytes of each device, and of the machine.

    Raises:
        ValueError: with the cure, if the step cannot be run without memory.
    """
    settings = with_known_shape(settings, wishes)
    choose_strategy(settings, wishes.gpus)
    return predicted_peaks(settings, "cpu" if wishes.gpu_memory is None else "cuda", wishes.gpus)


def with_known_shape(settings: Namespace, wishes: Wishes) -> Namespace:
    """The settings of a model whose shape is known here: of one from the hub that of the published model."""
    settings = Namespace(model=settings.model, data=settings.data, trainer=settings.trainer).clone()
    if wishes.pretrained is not None and not Path(wishes.pretrained).expanduser().is_dir():
        settings.model.policy.init_args.pretrained = models()[wishes.model]
    return settings


def num_weights(settings: Namespace, wishes: Wishes) -> int:
    """The number of a transformer's weights."""
    settings = with_known_shape(settings, wishes)
    with warnings.catch_warnings(), local_files(settings), quiet():
        warnings.simplefilter("ignore")
        policy = new_policy(settings)
        assert isinstance(policy, FlowPolicy)  # every family's is one
        transformer = policy.empty_transformer()
    return sum(parameter.numel() for parameter in transformer.parameters())


def fits(found: Prediction, wishes: Wishes, host_memory: int | None) -> bool:
    """Whether the GPUs and the machine have room."""
    assert wishes.gpu_memory is not None
    has_room = found.peak <= wishes.gpu_memory - KEPT_FREE and not found.is_bound
    return has_room and (host_memory is None or found.host <= host_memory)


def refusal(wishes: Wishes, tried: list[Prediction], other: Prediction | None, host_memory: int | None) -> str:
    """Why nothing fits, and what is nearest."""
    assert wishes.gpu_memory is not None
    nearest = min(tried, key=lambda own: (own.is_bound, own.peak))
    takes = f"{'more than ' if nearest.is_bound else ''}{gib(nearest.peak)}"
    needs = {}  # what is exceeded: what would do
    if nearest.is_bound or nearest.peak > wishes.gpu_memory - KEPT_FREE:
        there = f"{gib(wishes.gpu_memory)} of GPU memory with {gib(KEPT_FREE)} kept free"
        needs[there] = f"{gib(nearest.peak + KEPT_FREE)} of GPU memory"
    if host_memory is not None and nearest.host > host_memory:
        takes += f" and {gib(nearest.host)} of the machine"
        needs[f"{gib(host_memory)} of the machine's memory"] = f"{gib(nearest.host)} of the machine's memory"
    there = " and ".join(needs)
    head = f"{wishes.model} does not fit {there}, trained as asked: {nearest.form.words} takes {takes}"
    if other is not None:
        return f"{head}; {other.form.words} would fit, with {gib(other.peak)}: --method {other.form.method}"
    return f"{head}, so {' and '.join(needs.values())} or more are needed; `recipes` lists smaller models (--model)"


def _builtin(wishes: Wishes) -> Prediction:
    """The built-in model, trained in full: on a GPU or on the processor, whose memory is the machine's."""
    if wishes.method in ("lora", "qlora"):
        raise ValueError(f"method is {wishes.method}: the built-in model is small and trained in full, --method full")
    own = draft(OF_BUILTIN.recipes, wishes)
    peak, host = peaks(read(own), wishes)
    room = machine_memory() if wishes.gpu_memory is None else wishes.gpu_memory
    taken = max(peak, host if wishes.gpu_memory is None else 0)
    if taken > SHARE_OF_MACHINE * room:
        raise ValueError(f"the built-in model takes {gib(taken)}, where {gib(room)} are there: close other programs")
    return Prediction(OF_BUILTIN, own, peak, host, is_bound=False)


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / GIB:.1f} GiB"
