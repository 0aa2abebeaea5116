"""A configuration's settings: recipes one upon the other, and what is wished upon them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import yaml

from srpo_lightning.callbacks import RewardTracking
from srpo_lightning.config.shipped import RECIPES, with_builtin
from srpo_lightning.data.prompts import read_prompts
from srpo_lightning.jobs.init.comments import Place, comments_of
from srpo_lightning.jobs.init.wishes import BUILTIN, FAMILIES, FLUX, REWARDS, Wishes

PROMPTS_PER_STEP, STEPS_BETWEEN = 32, 5
"""The paper's batch, and how often the recipes evaluate; the number of GPUs divides both."""

HELD_OUT = 0.05
"""Share of own training prompts that is held out where no others are given."""

TOP = 5
"""Candidates among which RewardTracking looks for a picture's own prompt; there must be more."""

MOST_CANDIDATES = 2000
"""Candidates that are compared with every picture at most: each is a text that the judge encodes."""


class Draft(NamedTuple):
    """Settings of a configuration in their nesting, and comments on some of them."""

    settings: dict[str, Any]
    comments: dict[Place, str]


def files_of(recipes: Iterable[str], model: str) -> list[str]:
    """The recipes of a form, and behind the first, which says what is trained, the one of the model."""
    first, *rest = recipes
    return [first, *([] if model in (BUILTIN, FLUX) else [f"{FAMILIES}{model}"]), *rest]


def draft(recipes: Iterable[str], wishes: Wishes) -> Draft:
    """The settings of recipes, with what is wished for.

    Args:
        recipes: Names of recipes; each changes what those before it say.
        wishes: Model, prompts, reward and GPUs.
    """
    found = Draft({}, {})
    for name in recipes:
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        _merge(found.settings, yaml.safe_load(text))
        found.comments.update(comments_of(text))
    own = found.settings
    run = own["trainer"]["default_root_dir"] = f"runs/{wishes.output.stem}"
    for place, comment in found.comments.items():
        found.comments[place] = re.sub(r"\bruns/\w+", run, comment)
    own["model"]["policy"]["init_args"]["pretrained"] = (
        wishes.pretrained or (own["model"]["policy"]["init_args"]["pretrained"])
    )
    if wishes.model != BUILTIN:
        _use_gpus(found, wishes.gpus)
    if wishes.reward is not None:
        _use_reward(found, wishes.reward)
    if wishes.train is not None or wishes.evaluation is not None:
        _use_prompts(found, wishes)
    return found


def _merge(settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change settings in place; groups are merged, all else is replaced."""
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            _merge(settings[name], value)
        else:
            settings[name] = value


def _use_gpus(found: Draft, gpus: int) -> None:
    trainer, comments = found.settings["trainer"], found.comments
    accumulate = max(1, PROMPTS_PER_STEP // gpus)
    trainer |= {"devices": gpus, "accumulate_grad_batches": accumulate}
    trainer["val_check_interval"] = STEPS_BETWEEN * accumulate
    comments.pop(("trainer", "devices"), None)
    comments["trainer", "accumulate_grad_batches"] = (
        f"{gpus} GPU{'s' if gpus > 1 else ''} x 1 prompt x {accumulate}; the paper's global batch is {PROMPTS_PER_STEP}"
    )
    strategy = trainer.get("strategy")
    if isinstance(strategy, dict) and strategy["init_args"]["shard_size"] > 1:
        strategy["init_args"]["shard_size"] = gpus


def _use_reward(found: Draft, name: str) -> None:
    model, comments = found.settings["model"], found.comments
    known = REWARDS.get(name)
    model["reward"] = {"class_path": f"srpo_lightning.rewards.{name}" if known else name}
    if known:
        model["reward"]["init_args"] = dict(known)
    for place in [place for place in comments if place[:2] == ("model", "reward")]:
        del comments[place]
    if name != next(iter(REWARDS)):
        model["objective"]["init_args"]["margin"] = 10
        comments["model", "objective", "init_args", "margin"] = (
            "never reached: set it to what good pictures get under this reward"
        )


def _use_prompts(found: Draft, wishes: Wishes) -> None:
    data = found.settings["data"]
    if wishes.train is not None:
        data["train"] = wishes.train
        del data["evaluation"]
        data["validation_fraction"] = HELD_OUT
        found.comments["data", "validation_fraction"] = "of the training prompts, held out by a hash of their text"
    if wishes.evaluation is not None:
        data.pop("validation_fraction", None)
        data["evaluation"] = wishes.evaluation
    candidates = list(dict.fromkeys(filter(None, (wishes.evaluation or wishes.train,))))
    num_candidates = sum(len(read_prompts(str(with_builtin(path))).prompts) for path in candidates)
    for callback in found.settings["trainer"]["callbacks"]:
        if callback["class_path"].endswith(f".{RewardTracking.__name__}"):
            callback["init_args"]["candidates"] = candidates
            if not TOP < num_candidates <= MOST_CANDIDATES:
                del callback["init_args"]["candidates"]
