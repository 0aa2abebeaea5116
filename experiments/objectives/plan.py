"""What a benchmark runs: rows, each at several learning rates and from several seeds, as configurations of `fit`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt, register_type

from experiments.objectives.forwards import Forwards, count_forwards
from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.objectives import Objective

COUNTED_STEPS = 100
CONFIG = "run.yaml"
NAMED_ALONE = {"default_callbacks": False}


class Settings:
    """A part of a configuration as it is written, with classes by their paths: runs make them, not the benchmark.

    Args:
        values: Settings in their nesting.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)


register_type(Settings, serializer=lambda settings: settings.values, deserializer=Settings)


@dataclass
class Row:
    """A line of the table.

    Args:
        objective: Objective by `class_path` and `init_args`, as in model.objective.
        settings: Settings, in their nesting, that differ from the common ones; null changes none.
        learning_rates: Learning rates to choose from; null takes the benchmark's.
        learning_rate_of: Row whose choice of a learning rate is taken over, instead of trying any.
        num_seeds: Number of seeds that are run at the chosen learning rate; null runs all.
        compute: Factor of the benchmark's compute that the row may spend.
        needs: Path without which the row is left out.
        curve: Whether the figure shows the row.
        is_reference: Whether every other row is compared with this one over the conditions.
    """

    objective: Settings
    settings: Settings | None = None
    learning_rates: list[PositiveFloat] | None = None
    learning_rate_of: str | None = None
    num_seeds: int | None = None
    compute: PositiveFloat = 1.0
    needs: str | None = None
    curve: bool = True
    is_reference: bool = False


@dataclass
class Condition:
    """Settings under which all rows are compared.

    Args:
        settings: Settings of `fit`, in their nesting, that differ from the common ones.
        strength: Number that the figure over conditions shows it at; null shows it beside the others.
        between: Conditions before it, between whose choices of a learning rate a row chooses; null tries all.
        num_seeds: Number of seeds that are run at the chosen learning rates; null runs all.
    """

    settings: Settings
    strength: float | None = None
    between: list[str] | None = None
    num_seeds: PositiveInt | None = None


class Run(NamedTuple):
    """One training run.

    Args:
        row: Name of the row.
        learning_rate: Learning rate of the optimizer.
        seed: Seed of all random numbers.
        folder: Run folder.
        steps: Number of optimizer steps.
        every: Number of steps from one evaluation to the next.
        forwards: Number of the policy's forward passes per step, over all samples (counted by forwards.py).
        settings: Settings of `fit`.
        base: Evaluation of the weights before training; None for itself.
        former_keys: Keys that earlier versions gave the same run, by which an archive may know it.
    """

    row: str
    learning_rate: float
    seed: int
    folder: Path
    steps: int
    every: int
    forwards: float
    settings: dict[str, Any]
    base: "Run | None" = None
    former_keys: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A hash of all settings, wherever the run lies; the weights before training are measured without objective."""
        return key_of(self.steps, self.settings if self.steps else with_objective(self.settings, {}))


class Plan(NamedTuple):
    """What all runs have in common.

    Args:
        fit: Settings of `fit`, without an objective.
        rows: Rows by name.
        learning_rates: Learning rates that a row which names no others chooses from.
        seeds: Seeds of the runs. The first one decides on the learning rate, and where there are others it is in no
            mean.
        forwards: Number of the policy's forward passes that each run may spend.
        evaluations: Number of evaluations of each run, at equal distances, the last one at its end.
        folder: Folder of all runs.
    """

    fit: dict[str, Any]
    rows: Mapping[str, Row]
    learning_rates: list[float]
    seeds: list[int]
    forwards: int
    evaluations: int
    folder: Path

    @property
    def measured_seeds(self) -> list[int]:
        """The seeds of the means: a rate that was chosen by a seed would flatter that seed."""
        return self.seeds[1:] or self.seeds

    def run(self, row: str, learning_rate: float, seed: int) -> Run:
        """A row's run."""
        own = self.rows[row]
        settings = merged(self.fit, own.settings.values if own.settings else {})
        settings["model"]["objective"] = deepcopy(own.objective.values)
        forwards = forwards_per_step(settings, seed)
        every = max(1, round(self.forwards * own.compute / forwards / self.evaluations))
        folder = self.folder / file_name(row) / f"lr-{learning_rate:g}-seed-{seed}"
        changes = {
            "seed_everything": seed,
            "model": {"optimizer": {"init_args": {"lr": float(learning_rate)}}},  # YAML knows no restricted number
            "checkpoint": {"every_n_steps": every, "keep": 1},
            "trainer": {
                "default_root_dir": str(folder),
                "max_steps": every * self.evaluations,
                "val_check_interval": every * settings["trainer"].get("accumulate_grad_batches", 1),
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,  # the base is measured once for all runs of a seed
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
        }
        settings = merged(settings, changes)
        steps = every * self.evaluations
        return Run(row, learning_rate, seed, folder, steps, every, forwards, settings, self.base(seed))

    def rates(self, row: str) -> list[float]:
        """The learning rates that a row chooses from, lowest first; none where the choice is another row's."""
        own = self.rows[row]
        return [] if own.learning_rate_of else sorted(own.learning_rates or self.learning_rates)

    def base(self, seed: int) -> Run:
        """The evaluation of the weights before training, which is the same for all rows.

        `validate` asks for an objective; earlier versions had that of the first row in the key, whichever that was.
        """
        folder = self.folder / "base" / f"seed-{seed}"
        settings = merged(self.fit, {"seed_everything": seed, "trainer": {"default_root_dir": str(folder)}})
        with_each = [with_objective(settings, row.objective.values) for row in self.rows.values()]
        former_keys = tuple(key_of(0, own) for own in with_each)
        return Run("base", 1.0, seed, folder, 0, 0, 0.0, with_each[0], former_keys=former_keys)


def key_of(steps: int, settings: Mapping[str, Any]) -> str:
    """A hash of settings but for the folder."""
    own = merged(settings, {"trainer": {"default_root_dir": None}})
    return hashlib.sha256(json.dumps([steps, own], sort_keys=True).encode()).hexdigest()[:16]


def with_objective(settings: Mapping[str, Any], objective: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with another objective in the place of theirs."""
    return {**settings, "model": {**settings["model"], "objective": deepcopy(dict(objective))}}


def rates_to_try(rates: Sequence[float], judged: Mapping[float, float], start: float | None = None) -> list[float]:
    """The learning rates to try next: those beside the best, until it lies between two others or ends the list.

    Args:
        rates: Learning rates to choose from, lowest first.
        judged: Score of each that was tried; those that are no longer to choose from count for nothing.
        start: Learning rate that the search begins at, with both beside it; None: the middle one.
    """
    if not rates:
        return []
    known = [rate for rate in rates if rate in judged]
    best = max(known, key=judged.__getitem__) if known else start if start in rates else rates[len(rates) // 2]
    place = rates.index(best)
    return [rate for rate in rates[max(place - 1, 0) : place + 2] if rate not in judged]


def forwards_per_step(settings: Mapping[str, Any], seed: int) -> float:
    """Forward passes of an optimizer step of these settings, over all samples."""
    objective = json.dumps(settings["model"]["objective"], sort_keys=True)
    data, model = settings["data"], settings["model"]
    ratio = data.get("offline_ratio", 0.0)
    total = 0.0
    for share, is_real in ((1 - ratio, False), (ratio, True)):
        if share:
            counted = counted_once(objective, data["batch_size"], seed, is_real)
            total += share * (counted.rollout / model.get("updates_per_rollout", 1) + counted.update)
    return total * settings["trainer"].get("accumulate_grad_batches", 1)


@cache
def counted_once(objective: str, batch_size: int, seed: int, is_real: bool) -> Forwards:
    """Forward passes, which no learning rate changes; `objective` is its part of a configuration as JSON."""
    return count_forwards(instantiate(json.loads(objective)), batch_size, seed, range(COUNTED_STEPS), is_real)


def instantiate(objective: Mapping[str, Any]) -> Objective:
    """An objective from its part of a configuration."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Objective)
    made: Objective = parser.instantiate_classes(parser.parse_object({"objective": dict(objective)})).objective
    return made


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others in their place; dictionaries are merged, all else is replaced."""
    result = deepcopy(dict(settings))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else deepcopy(value)
    return result


def file_name(row: str) -> str:
    """A row's name as that of a folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in row.lower()).strip("-")


def write_config(run: Run) -> Path:
    """The configuration of a run in its folder; what is there must be the same.

    Callbacks are those that it names alone, so that all rows do the same beside their steps.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    path, text = run.folder / CONFIG, yaml.safe_dump({**run.settings, **NAMED_ALONE}, sort_keys=False)
    there = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else run.settings
    there = {name: value for name, value in there.items() if name in run.settings or name not in NAMED_ALONE}
    if run._replace(settings=there).key != run.key:
        raise ValueError(
            f"{run.folder} was run with other settings: delete it, or name another --folder, to run {run.row!r} again"
        )
    with complete_or_absent(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path
