"""The command: tries learning rates, runs all seeds, reports."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from experiments.objectives.claims import claims
from experiments.objectives.figure import draw, show
from experiments.objectives.plan import Plan, Row, Run, Settings
from experiments.objectives.processes import Runner, is_done
from experiments.objectives.report import Report, write
from experiments.objectives.results import Curve, Results, read_curve
from srpo_lightning.callbacks.tracking import RewardTracking
from srpo_lightning.config.classes import is_class

QUICK = 4


def benchmark(
    fit: Settings,
    rows: dict[str, Row],
    learning_rates: list[float],
    forwards: PositiveInt,
    label: str,
    target: float,
    seeds: list[int],
    evaluations: PositiveInt = 3,
    folder: str = "runs/benchmark",
    num_workers: PositiveInt = 2,
    quick: bool = False,
    report_only: bool = False,
    check_claims: bool = True,
) -> None:
    """Train by every objective at equal compute, and compare what came of it.

    Each row is trained at several learning rates from the first seed; the one with the best held-out judge at the end
    is run from all seeds. What is done is never done again: a second call goes on where the first was stopped. Writes
    `table.md`, `results.json`, `curves.png` and `pictures.png` into the folder.

    Args:
        fit: settings of `fit` that all runs share, with RewardTracking among its callbacks.
        rows: what is compared, by name.
        learning_rates: tried for every row that names no others.
        forwards: passes of the policy on one sample that each run may spend; a backward pass counts two.
        label: the one of RewardTracking's labels that is wanted.
        target: of the judge, for the time that it takes to reach it.
        seeds: of the runs; the first one chooses the learning rates, and where there are others it is in no mean.
        evaluations: of each run, at equal distances.
        folder: of all runs and of the report.
        num_workers: runs at a time.
        quick: a quarter of the compute, one evaluation, one seed, the middle learning rate; in a folder of its own.
        report_only: train nothing, report on what is there.
        check_claims: say what the paper claims and whether it holds; for the rows of experiments/objectives/emoji.yaml.

    Raises:
        ValueError: if a run failed, after all others are done.
    """
    check_filled(fit=fit.values, rows=rows, learning_rates=learning_rates, seeds=seeds)
    plan = Plan(fit.values, present(rows), learning_rates, seeds, forwards, evaluations, Path(folder))
    if quick:
        plan = plan._replace(seeds=seeds[:1], forwards=forwards // QUICK, evaluations=1, folder=Path(f"{folder}_quick"))
        plan = plan._replace(rows={name: untried(row, learning_rates) for name, row in plan.rows.items()})
    runner = Runner(num_workers)
    labels = labels_of(plan.fit)
    results, sweeps = carry_out(plan, runner, labels, trains=not report_only)
    report = Report(results, sweeps, label, target, claims(results, labels) if check_claims else [])
    print(write(report, plan.folder))
    print(draw(report, plan.folder / "curves.png", [name for name, row in plan.rows.items() if not row.curve]))
    print(show(results, plan.folder / "pictures.png"))
    if runner.failed:
        raise ValueError(f"{len(runner.failed)} runs failed, the table is without them; the same command tries again")


def check_filled(**settings: Any) -> None:
    """Refuse a plan in which nothing would be run.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in settings.items():
        if not value:
            raise ValueError(f"{name} is empty: give at least one, or there is nothing to compare")


def carry_out(plan: Plan, runner: Runner, labels: Sequence[str], trains: bool) -> tuple[Results, Results]:
    """Run what is not done, if anything is to be trained; returns the curves of all rows and of the sweeps."""
    bases = {seed: plan.base(seed) for seed in plan.seeds}
    tried = {name: plan.tried(name) for name in plan.rows}
    if trains:
        runner(bases.values(), {})
        if runner.failed:
            raise ValueError("the weights before training could not be evaluated: see the log above")
        runner((run for runs in tried.values() for run in runs), bases)
    sweeps = {name: curves for name, runs in tried.items() if (curves := of_done(runs, labels))}
    runs = {name: of_seeds(plan, name, rate) for name, rate in choose(plan, sweeps).items()}
    if trains:
        # Seed by seed, so that a benchmark that is stopped has whole tables of fewer seeds.
        runner((own[i] for i in range(len(plan.seeds)) for own in runs.values() if i < len(own)), bases)
    results = {"base": of_done((bases[seed] for seed in plan.measured_seeds), labels)}
    if not results["base"]:
        raise ValueError(f"nothing in {plan.folder} to report on: leave --report_only away")
    return results | {name: curves for name, own in runs.items() if (curves := of_done(own, labels))}, sweeps


def of_done(runs: Iterable[Run], labels: Sequence[str]) -> list[Curve]:
    """The curves of those runs that have come to their end."""
    return [read_curve(run, labels) for run in runs if is_done(run)]


def present(rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows that can be run here."""
    missing = {name: row.needs for name, row in rows.items() if row.needs and not Path(row.needs).exists()}
    for name, path in missing.items():
        print(f"{name} is left out: {path} is not here")
    return {name: row for name, row in rows.items() if name not in missing}


def untried(row: Row, learning_rates: list[float]) -> Row:
    """The same with the middle one of its learning rates."""
    rates = row.learning_rates or learning_rates
    return Row(**{**vars(row), "learning_rates": [sorted(rates)[len(rates) // 2]]})


def labels_of(fit: Mapping[str, Any]) -> list[str]:
    """Those that RewardTracking tells images apart by, if it measures all rows alike."""
    for callback in fit["trainer"]["callbacks"]:
        if is_class(callback["class_path"], RewardTracking):
            if "form" not in callback["init_args"]:
                raise ValueError(
                    "RewardTracking measures every objective by its own form, which compares nothing: give it one, for "
                    "instance form: {class_path: srpo_lightning.objectives.Plain}"
                )
            return list(callback["init_args"]["labels"])
    raise ValueError(
        "fit.trainer.callbacks has no RewardTracking, which measures what is compared: add it, with labels"
    )


def choose(plan: Plan, sweeps: Results) -> dict[str, float]:
    """The learning rate of each row: that of the best judge at the end."""
    best = {
        name: max(curves, key=lambda curve: curve.last["judge"]).run.learning_rate for name, curves in sweeps.items()
    }
    return best | {
        name: best[row.learning_rate_of]
        for name, row in plan.rows.items()
        if row.learning_rate_of and row.learning_rate_of in best
    }


def of_seeds(plan: Plan, row: str, learning_rate: float) -> list[Run]:
    """A row's runs."""
    return [plan.run(row, learning_rate, seed) for seed in plan.measured_seeds[: plan.rows[row].num_seeds]]
