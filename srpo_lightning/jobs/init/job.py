"""`init`: asks on a terminal, or takes options, and writes one configuration with comments that fits the memory."""

import shlex
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from jsonargparse.typing import PositiveInt

from srpo_lightning.config.shipped import RECIPE
from srpo_lightning.data.selection import select_evaluation
from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.jobs.estimate.host import machine_memory
from srpo_lightning.jobs.estimate.units import parse_bytes
from srpo_lightning.jobs.init import wishes as said
from srpo_lightning.jobs.init.comments import commented
from srpo_lightning.jobs.init.forms import OF_BUILTIN, Prediction, fitting, gib, read
from srpo_lightning.jobs.init.questions import Question, ask
from srpo_lightning.jobs.init.settings import files_of
from srpo_lightning.jobs.init.wishes import BUILTIN, METHODS, REWARDS, Wishes, models

Value = TypeVar("Value")


def init(
    model: str | None = None,
    pretrained: str | None = None,
    gpu_memory: str | None = None,
    gpus: PositiveInt | None = None,
    method: str | None = None,
    train: str | None = None,
    evaluation: str | None = None,
    reward: str | None = None,
    output: str | None = None,
    host_memory: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a configuration with comments that fits the memory; on a terminal, ask for what is not said.

    Args:
        model: Name of the model: builtin, flux_dev or a recipe of `families/`, such as z_image; or its hub id.
        pretrained: Folder, or hub id, of weights in the place of the published ones; null takes those.
        gpu_memory: Memory of one GPU, such as 24GiB; null takes that of this machine's GPU.
        gpus: Number of GPUs; null takes those of this machine, or one.
        method: What is trained: all weights (full), an adapter (lora), an adapter beside weights in 4 bits (qlora),
            or the first of these that fits (auto, also where null).
        train: File of training prompts, one per line; null takes those that come with the package.
        evaluation: File of held-out prompts; null takes those that come with the package, or a twentieth of own ones.
        reward: Reward: HPSv2, PickScore, ClipReward or a class_path; null takes the recipe's.
        output: File that is written; null names it by the model.
        host_memory: Memory of the machine beside its GPUs, such as 64GiB; null takes this one's where its GPU is asked
            for, and otherwise does not ask.
        overwrite: Whether a file that is there already is written over.

    Raises:
        ValueError: if an option cannot be used, or nothing fits, naming the nearest that would.
    """
    given = Given(is_asked=sys.stdin.isatty() and sys.stdout.isatty())
    name = given.value(model, Question(f"Model ({', '.join(models())})", BUILTIN), said.model)
    if name is None:
        raise ValueError(f"model is not said: give --model, one of {', '.join(models())}; on a terminal `init` asks")
    memory, number = (None, 1) if name == BUILTIN and gpu_memory is None else hardware(given, gpu_memory, gpus)
    asked = Question("What is trained: all weights (full), an adapter (lora), one beside 4 bits (qlora)", "auto")
    way = "full" if name == BUILTIN and method is None else given.value(method, asked, said.method) or METHODS[0]
    prompts = given.optional(train, "Training prompts, a file with one per line", said.prompts)
    held_out = given.optional(evaluation, "Held-out prompts, another file", said.prompts)
    scored = reward if name == BUILTIN else given.value(reward, Question("Reward", next(iter(REWARDS))), said.reward)
    file = given.value(
        output, Question("File to write", f"{name}.yaml"), lambda text: said.output(text, overwrite=overwrite)
    )
    wishes = Wishes(
        *(name, pretrained, memory, number, way, prompts, held_out),
        said.reward(scored) if scored is not None else None,
        file if file is not None else said.output(f"{name}.yaml", overwrite=overwrite),
    )
    machine = parse_bytes(host_memory) if host_memory else None
    if machine is None and memory is not None and gpu_memory is None:
        machine = machine_memory()
    write(wishes, fitting(wishes, machine))


class Given:
    """What is said by options, and on a terminal by answers.

    Args:
        is_asked: Whether there is a terminal.
    """

    def __init__(self, *, is_asked: bool) -> None:
        self.is_asked = is_asked

    def value(self, option: str | None, question: Question, read: Callable[[str], Value]) -> Value | None:
        """What an option says, or else an answer; None where there is neither."""
        if option is not None:
            return read(option)
        return ask(question, read) if self.is_asked else None

    def optional(self, option: str | None, text: str, read: Callable[[str], str]) -> str | None:
        """The same of what need not be said."""
        shipped = "those that come along"
        found = self.value(option, Question(text, shipped), lambda said: said if said == shipped else read(said))
        return None if found == shipped else found


def hardware(given: Given, gpu_memory: str | None, gpus: int | None) -> tuple[int, int]:
    """Bytes of each GPU, and how many there are.

    Raises:
        ValueError: if there is no GPU here, and none is said.
    """
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = f"{torch.cuda.get_device_properties(0).total_memory / (1 << 30):.1f}GiB" if here else None
    memory = given.value(gpu_memory, Question("Memory of one GPU, such as 24GiB", found), said.gpu_memory)
    if memory is None and found is None:
        raise ValueError("gpu_memory is not said, and there is no GPU here: give --gpu_memory, such as 24GiB")
    option = None if gpus is None else str(gpus)
    number = given.value(option, Question("Number of GPUs", str(max(here, 1))), said.gpus)
    has_own = gpu_memory is None and here > 0
    return memory or parse_bytes(str(found)), number or (here if has_own else 1)


def write(wishes: Wishes, found: Prediction) -> None:
    """Write the configuration, once `fit`'s own parser takes it and its prompts are there.

    Raises:
        ValueError: if it would be refused.
    """
    settings = read(found.draft)
    data = settings.data
    select_evaluation(data.train, data.evaluation, data.validation_fraction)
    text = head(wishes, found) + commented(found.draft.settings, found.draft.comments)
    with complete_or_absent(wishes.output) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"{wishes.output}: {found.form.words}, {needs(wishes, found)}")
    file = shlex.quote(str(wishes.output))
    if wishes.model != BUILTIN:
        print(f"what it downloads: srpo downloads --config {file}")
    print(f"train: srpo fit --config {file}")


def needs(wishes: Wishes, found: Prediction) -> str:
    """The predicted memory, in words."""
    if wishes.gpu_memory is None:
        return f"predicted peak {gib(found.peak)} of memory"
    each = f"predicted peak {gib(found.peak)} per GPU"
    return f"{each}, and {gib(found.host)} of the machine"


def head(wishes: Wishes, found: Prediction) -> str:
    """The comment that the file begins with."""
    recipes = found.form.recipes if found.form is OF_BUILTIN else files_of(found.form.recipes, wishes.model)
    made_of = " and ".join(f"{RECIPE}{name}" for name in recipes)
    machine = "this machine's processor, or any GPU"
    if wishes.gpu_memory is not None:
        machine = f"{wishes.gpus} GPU{'s' if wishes.gpus > 1 else ''} with {gib(wishes.gpu_memory)}"
    file = shlex.quote(str(wishes.output))
    lines = [
        f"{wishes.pretrained or models()[wishes.model]}: {found.form.words}.",
        f"  srpo fit --config {file}",
        f"  srpo fit --config {file} --ckpt_path last     # go on with a run that was stopped",
        f"Hardware: {machine}. From `estimate`: {needs(wishes, found)}.",
        f"Written by `srpo init` from {made_of}.",
        "All settings, and the callbacks that are on without being named here, are shown by `--print_config`.",
    ]
    return "".join(f"# {line}\n" for line in lines)
