"""The command: tries learning rates, runs all seeds, reports."""

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from experiments.objectives.claims import claims
from experiments.objectives.conditions import write_conditions
from experiments.objectives.figure import draw, show
from experiments.objectives.plan import Condition, Plan, Row, Run, Settings, file_name, merged, rates_to_try
from experiments.objectives.processes import Runner
from experiments.objectives.report import Report, write
from experiments.objectives.results import Archive, Curve, Results
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
    conditions: dict[str, Condition] | None = None,
    folder: str = "runs/benchmark",
    archive: str | None = None,
    num_workers: PositiveInt = 2,
    quick: bool = False,
    report_only: bool = False,
    check_claims: bool = True,
) -> None:
    """Train by every objective at equal compute, and compare what came of it.

    Each row is trained from the first seed at learning rates around the best, which is the one with the best held-out
    judge at the end; that is run from all seeds. What is done is never done again: a second call goes on where the
    first was stopped. Writes `table.md`, `results.json`, `curves.png` and `pictures.png` into the folder, or into one
    for each condition, and of several conditions `conditions.md` and `conditions.png`.

    Args:
        fit: Settings of `fit` that all runs share, with RewardTracking among its callbacks.
        rows: Rows that are compared, by name.
        learning_rates: Learning rates to choose from, for every row that names no others.
        forwards: Number of forward passes of the policy, on one sample, that each run may spend; a backward pass counts
            as two.
        label: Label of RewardTracking's that is wanted.
        target: Score of the judge whose first time is reported.
        seeds: Seeds of the runs. The first one chooses the learning rates, and where there are others it is in no mean.
        evaluations: Number of evaluations of each run, at equal distances.
        conditions: Settings under which all rows are compared one after the other, by name; null compares them once.
        folder: Folder of all runs and of the report.
        archive: File that keeps the curves of all runs that are done, and from which another machine goes on; null is
            `runs.jsonl` in the folder.
        num_workers: Number of runs at a time.
        quick: Whether a quarter of the compute is spent, with one evaluation, one seed and the middle learning rate, in
            a folder of its own.
        report_only: Whether nothing is trained, and what is there is reported on.
        check_claims: Whether the report says what the paper claims, and if it holds. The rows must be named as in
            experiments/objectives/emoji.yaml.

    Raises:
        ValueError: if a run failed, after all others are done.
    """
    check_filled(fit=fit.values, rows=rows, learning_rates=learning_rates, seeds=seeds)
    plan = Plan(fit.values, present(rows), learning_rates, seeds, forwards, evaluations, Path(folder))
    if quick:
        plan = plan._replace(seeds=seeds[:1], forwards=forwards // QUICK, evaluations=1, folder=Path(f"{folder}_quick"))
        plan = plan._replace(rows={name: untried(row, learning_rates) for name, row in plan.rows.items()})
    labels = labels_of(plan.fit)
    runner = Runner(
        num_workers, Archive(Path(archive) if archive and not quick else plan.folder / "runs.jsonl", labels)
    )
    conditions = conditions or {}
    plans = {name: under(plan, name, condition) for name, condition in conditions.items()} or {"": plan}
    results, sweeps = carry_out(plans, runner, conditions, trains=not report_only)
    if not any(results.values()):
        raise ValueError(f"nothing in {plan.folder} to report on: leave --report_only out")
    for name, own in plans.items():
        if results[name]:
            if "base" not in results[name]:
                print(f"{own.folder} has no row of the weights before training: they are not measured here")
            held = claims(results[name], labels) if check_claims else []
            report = Report(results[name], sweeps[name], label, target, held)
            print(write(report, own.folder))
            print(draw(report, own.folder / "curves.png", [row for row in own.rows if not own.rows[row].curve]))
            print(show(results[name], own.folder / "pictures.png"))
    if conditions:
        print(
            write_conditions(
                conditions, results, label, [name for name, row in rows.items() if row.is_reference], plan.folder
            )
        )
    if runner.failed:
        raise ValueError(f"{len(runner.failed)} runs failed, the table is without them; the same command tries again")


def under(plan: Plan, name: str, condition: Condition) -> Plan:
    """The plan under a condition, in a folder of its own."""
    return plan._replace(
        fit=merged(plan.fit, condition.settings.values),
        seeds=plan.seeds[: 1 + condition.num_seeds] if condition.num_seeds else plan.seeds,
        folder=plan.folder / file_name(name),
    )


def check_filled(**settings: Any) -> None:
    """Refuse a plan in which nothing would be run.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in settings.items():
        if not value:
            raise ValueError(f"{name} is empty: give at least one, or there is nothing to compare")


def carry_out(
    plans: Mapping[str, Plan], runner: Runner, conditions: Mapping[str, Condition], trains: bool
) -> tuple[dict[str, Results], dict[str, Results]]:
    """Run what is not done, if anything is to be trained; returns the curves and the sweeps of each condition."""
    if trains:
        sweep_all(plans, runner, conditions)
        chosen = [runs for plan in plans.values() for runs in chosen_runs(plan, runner.archive).values()]
        # Seed by seed, so that a benchmark that is stopped has whole tables of fewer seeds.
        runner(run for of_seed in zip_longest(*chosen) for run in of_seed if run is not None)
    return (
        {name: results_of(plan, runner.archive) for name, plan in plans.items()},
        {name: swept(plan, runner.archive) for name, plan in plans.items()},
    )


def sweep_all(plans: Mapping[str, Plan], runner: Runner, conditions: Mapping[str, Condition]) -> None:
    """Find each row's learning rate under each condition; a search begins with the choice under the one before."""
    chosen: dict[str, dict[str, float]] = {}
    starts: dict[str, float] = {}
    for name, plan in plans.items():
        between = conditions[name].between if conditions else None
        rates = {row: plan.rates(row) for row in plan.rows}
        for row in rates if between else ():
            found = [chosen[other][row] for other in between or () if row in chosen[other]]
            rates[row] = [rate for rate in rates[row] if not found or min(found) <= rate <= max(found)]
        sweep(plan, runner, rates, starts)
        starts = chosen[name] = choose(plan, runner.archive)


def sweep(plan: Plan, runner: Runner, rates: Mapping[str, list[float]], starts: Mapping[str, float]) -> None:
    """Try learning rates until the best of each row is bracketed."""
    while True:
        judged = {
            row: {curve.run.learning_rate: curve.last["judge"] for curve in curves}
            for row, curves in swept(plan, runner.archive).items()
        }
        tried = [
            plan.run(row, rate, plan.seeds[0])
            for row in plan.rows
            for rate in rates_to_try(rates[row], judged.get(row, {}), starts.get(row))
        ]
        wanted = [run for run in tried if run not in runner.failed]
        if not wanted:
            return
        runner(wanted)


def swept(plan: Plan, archive: Archive) -> dict[str, list[Curve]]:
    """The curves of each row at the learning rates that were tried."""
    found = {row: archive.curves(plan.run(row, rate, plan.seeds[0]) for rate in plan.rates(row)) for row in plan.rows}
    return {row: curves for row, curves in found.items() if curves}


def choose(plan: Plan, archive: Archive) -> dict[str, float]:
    """The learning rate of each row: that of the best judge at the end."""
    best = {
        name: max(curves, key=lambda curve: curve.last["judge"]).run.learning_rate
        for name, curves in swept(plan, archive).items()
    }
    return best | {
        name: best[row.learning_rate_of]
        for name, row in plan.rows.items()
        if row.learning_rate_of and row.learning_rate_of in best
    }


def chosen_runs(plan: Plan, archive: Archive) -> dict[str, list[Run]]:
    """The runs of each row's means."""
    return {
        row: [plan.run(row, rate, seed) for seed in plan.measured_seeds[: plan.rows[row].num_seeds]]
        for row, rate in choose(plan, archive).items()
    }


def results_of(plan: Plan, archive: Archive) -> Results:
    """The curves of each row, and of the base."""
    found = {"base": archive.curves(plan.base(seed) for seed in plan.measured_seeds)}
    found |= {row: archive.curves(runs) for row, runs in chosen_runs(plan, archive).items()}
    return {row: curves for row, curves in found.items() if curves}


def present(rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows that can be run here."""
    missing = {name: row.needs for name, row in rows.items() if row.needs and not Path(row.needs).exists()}
    for name, path in missing.items():
        print(f"{name} is left out: {path} is not here")
    return {name: row for name, row in rows.items() if name not in missing}


def untried(row: Row, learning_rates: list[float]) -> Row:
    """A row with the middle one of its learning rates alone."""
    rates = row.learning_rates or learning_rates
    return Row(**{**vars(row), "learning_rates": [sorted(rates)[len(rates) // 2]]})


def labels_of(fit: Mapping[str, Any]) -> list[str]:
    """The labels that RewardTracking tells images apart by, if it measures all rows alike."""
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
