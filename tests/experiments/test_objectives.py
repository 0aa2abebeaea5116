"""`benchmark`: what is counted, what is run, and what is said of it."""

import json
import math
import random
import signal
import statistics
import time
from pathlib import Path

import pytest
import yaml

from experiments.objectives import processes as runner
from experiments.objectives.__main__ import main
from experiments.objectives.claims import BASELINES, COMBINED, LATE, OTHERS, at_end, claims
from experiments.objectives.conditions import crossing
from experiments.objectives.forwards import count_forwards
from experiments.objectives.plan import Plan, Row, Run, Settings, merged, rates_to_try
from experiments.objectives.results import Archive, Curve, Point, difference, mean_over_seeds
from srpo_lightning import cli
from srpo_lightning.objectives import (
    GRPO,
    SRPO,
    ControlWords,
    DirectAlign,
    DRaFT,
    DRTune,
    FlowBPLagrange,
    FlowBPSparse,
    LeapAlign,
    ReFL,
)
from tests import processes, tiny

REPOSITORY = Path(__file__).parents[2]
PLANS = sorted((REPOSITORY / "experiments" / "objectives").glob("*.yaml"))
PROGRAM = "experiments.objectives.__main__"

WORDS = ControlWords(["x"], ["y"])


@pytest.fixture(autouse=True)
def _one_server(monkeypatch):
    """Runs are forked from the server that those of all tests are: another would import everything again."""
    monkeypatch.setattr(runner, "PRELOADED", processes.PRELOADED)


@pytest.mark.parametrize(
    ("objective", "rollout", "update"),
    [
        (SRPO(WORDS, num_rollout_steps=10), 10, 2 * 3),
        (DirectAlign(num_rollout_steps=10), 10, 3),
        (ReFL(num_steps=10, late_steps=(7, 7)), 7, 3),
        (DRaFT(num_steps=10, num_trained_steps=4), 6, 4 * 4),  # a checkpointed step is computed twice
        (DRaFT(num_steps=10, num_variants=2, step_checkpointing=False), 9, 3 * 3),
        (DRTune(num_steps=10, num_trained_steps=10, early_stop=0.1), 9, 10 * 3),
        (LeapAlign(num_steps=10), 10, 2 * 3),
        (FlowBPSparse(num_steps=10), 10, 3 * 3),
        (FlowBPLagrange(num_steps=10, num_supports=1, num_trained_supports=1), 10, 2 * 3),
        (GRPO(num_steps=11, group_size=4, timestep_fraction=0.5), 4 * 11, 4 * 5 * 4),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else "",
)
def test_forward_passes_are_those_of_the_formula(objective, rollout, update):
    assert count_forwards(objective, 3, 0, range(4), is_real=False) == (3 * rollout, 3 * update)


def test_real_pictures_need_no_rollout_and_random_steps_are_averaged():
    assert count_forwards(SRPO(WORDS), 2, 0, range(2), is_real=True) == (0, 12)
    mean = count_forwards(ReFL(num_steps=10, late_steps=(0, 9)), 1, 0, range(400), is_real=False)
    assert mean.rollout == pytest.approx(4.5, abs=0.5)
    mean = count_forwards(DRTune(num_steps=10, early_stop=0.1), 1, 0, range(400), is_real=False)
    assert mean.update == pytest.approx(3 * 3 + 3 / 4, abs=0.1)  # one in four trains the step it predicts from


SRPO_ROW = {"class_path": "srpo_lightning.objectives.SRPO", "init_args": {"control_words": vars(WORDS)}}


def plan(**settings) -> Plan:
    fit = {"model": {"optimizer": {"init_args": {}}}, "data": {"batch_size": 2}, "trainer": {}}
    rows = {"a": Row(Settings(SRPO_ROW), **settings)}
    return Plan(merged(fit, {}), rows, [1e-3, 1e-4], [7, 8], 1860, 3, Path("runs/b"))


def test_the_base_is_the_same_run_whatever_rows_a_plan_has():
    whole = plan()
    other = whole._replace(rows={"b": Row(Settings({"class_path": "srpo_lightning.objectives.ReFL"})), **whole.rows})
    part = whole._replace(rows={"b": other.rows["b"]})
    assert whole.base(7).key == other.base(7).key == part.base(7).key != whole.base(8).key
    assert whole.base(7).key != whole._replace(fit=merged(whole.fit, {"data": {"batch_size": 3}})).base(7).key
    assert whole.run("a", 1e-3, 7).key != other.run("b", 1e-3, 7).key


@pytest.mark.parametrize("condition", ["w = 0", "w = 3", "w = 1", "learned"])
def test_bases_that_were_kept_with_an_objective_in_their_key_are_found(condition):
    settings = yaml.safe_load((REPOSITORY / "experiments" / "objectives" / "bias.yaml").read_text())
    rows = {name: Row(Settings(row["objective"])) for name, row in settings["rows"].items()}
    fit = merged(settings["fit"], settings["conditions"][condition]["settings"])
    whole = Plan(fit, rows, [1e-3], settings["seeds"], 1, 1, Path("runs"))
    archive = Archive(REPOSITORY / settings["archive"], [])
    assert all(whole.base(seed) in archive for seed in settings["seeds"])
    (curve,) = archive.curves([whole.base(1)])
    assert curve.last["drift"] == 0
    changed = whole._replace(fit=merged(fit, {"model": {"num_sample_steps": 13}}))
    assert changed.base(1) not in archive


def test_a_run_spends_the_compute_in_as_many_steps_as_that_allows():
    run = plan().run("a", 1e-3, 7)
    assert (run.forwards, run.steps, run.every) == (2 * 31, 30, 10)
    assert run.settings["trainer"]["max_steps"] == 30
    assert plan(compute=2).run("a", 1e-3, 7).steps == 60
    reused = plan(settings=Settings({"model": {"updates_per_rollout": 5}})).run("a", 1e-3, 7)
    assert reused.forwards == 2 * (25 / 5 + 6)
    accumulated = plan(settings=Settings({"trainer": {"accumulate_grad_batches": 2}})).run("a", 1e-3, 7)
    assert (accumulated.forwards, accumulated.settings["trainer"]["val_check_interval"]) == (
        4 * 31,
        2 * accumulated.every,
    )
    assert plan().rates("a") == [1e-4, 1e-3]
    assert plan(learning_rate_of="b").rates("a") == []


@pytest.mark.parametrize("start", [None, 1, 16, 3])
@pytest.mark.parametrize("best", [1, 4, 16])
def test_learning_rates_are_tried_until_the_best_lies_between_two_others_or_ends_the_list(start, best):
    rates = [1, 2, 4, 8, 16]
    judged: dict[float, float] = {}
    while wanted := rates_to_try(rates, judged, start):
        judged |= {rate: -abs(math.log(rate / best)) for rate in wanted}
    place = rates.index(best)
    assert judged.keys() >= set(rates[max(place - 1, 0) : place + 2])
    assert start is not None or best != 4 or len(judged) == 3  # no rate is tried for nothing


def test_a_learning_rate_that_is_no_longer_to_choose_from_leads_no_search():
    assert rates_to_try([1, 2, 4], {8: 1.0, 4: 0.5}) == [2]
    assert rates_to_try([1, 2, 4], {8: 1.0}, 1) == [1, 2]


def test_a_row_is_ahead_from_where_its_gap_rises_through_zero_for_good():
    assert crossing([(0, -1), (1, 1), (2, -0.5), (3, 0.5), (4, 2)]) == "2.5"
    assert crossing([(0, 0.1), (3, 1)]) == "the start"
    assert crossing([(0, 1), (3, -1)]) == "nowhere"


def test_the_interval_is_students():
    values = [random.Random(0).gauss(0, 1) for _ in range(4)]
    interval = mean_over_seeds(values)
    half = 3.182 * statistics.stdev(values) / 2
    assert (interval.high - interval.low) / 2 == pytest.approx(half)
    assert math.isnan(mean_over_seeds([1.0]).low)


def curve(seed: int, forwards: float = 100.0, **end: float) -> Curve:
    first = {"judge": 0.4, "reward": 0.4, "saturation": 0.2, "diversity": 1.0, "share/a": 0.1, "share/b": 0.1}
    run = Run("", 1e-3, seed, Path(), 10, 5, 10.0, {})
    return Curve(run, [Point(0, 0, first), Point(forwards, forwards / 10, first | end)], None)


def rows(**changes: dict[str, float]) -> dict[str, list[Curve]]:
    """A table in which the paper is right, but for these."""
    found = {name: {"judge": 0.5, "reward": 0.5} for name in BASELINES}
    found |= {"SRPO": {"judge": 0.6, "reward": 0.6, "share/a": 0.9, "saturation": 0.21}, "SRPO to b": {"share/b": 0.8}}
    found |= {name: {"judge": 0.3, "reward": 0.9} for name in LATE}
    found |= {"SRPO, no inversion": {"saturation": 0.3}, "SRPO, real pictures": {"judge": 0.59}}
    found |= {name: {"judge": 0.7} for name in COMBINED}
    found |= {name: {"judge": 0.65} for name in OTHERS}
    found["GRPO"] = {"judge": 0.41}
    jitter = {1: 0.0, 2: 1e-4, 3: 2e-4}
    for name, change in changes.items():
        found[name] = found[name] | change
    return {
        name: [curve(s, **{k: v + jitter[s] * len(name) for k, v in end.items()}) for s in jitter]
        for name, end in found.items()
    }


def verdicts(**changes: dict[str, float]) -> list[str]:
    return [claim.verdict for claim in claims(rows(**changes), ["a", "b"])]


def test_every_claim_can_be_true_and_each_can_be_false():
    assert verdicts() == ["yes"] * 8
    assert verdicts(LeapAlign={"judge": 0.62})[0] == "no"
    assert verdicts(**{name: {"judge": 0.6, "reward": 0.5, "diversity": 1.1} for name in LATE})[1] == "no"
    assert verdicts(**{"SRPO, no inversion": {"saturation": 0.2}})[2] == "no"
    assert verdicts(GRPO={"judge": 0.59})[3] == "no"
    assert verdicts(**{"SRPO to b": {"share/b": 0.15}})[4] == "no"
    assert verdicts(**{"SRPO, real pictures": {"judge": 0.45}})[5] == "no"
    assert verdicts(**{name: {"judge": 0.55} for name in COMBINED})[6] == "no"
    assert verdicts(**{OTHERS[0]: {"judge": 0.5}})[7] == "yes", "one of them is enough"
    assert verdicts(**{name: {"judge": 0.5} for name in OTHERS})[7] == "no"
    assert {claim.verdict for claim in claims({"base": [curve(1)]}, ["a", "b"])} == {"not measured"}


def test_a_difference_within_chance_is_undecided():
    scattered = rows()
    scattered["LeapAlign"] = [curve(seed, judge=judge) for seed, judge in ((1, 0.5), (2, 0.61), (3, 0.59))]
    gap = difference(scattered["SRPO"], scattered["LeapAlign"], at_end("judge"))
    assert gap.low < 0 < gap.value
    assert claims(scattered, ["a", "b"])[0].verdict == "undecided"
    scattered["LeapAlign"] = [curve(seed, judge=judge) for seed, judge in ((1, 0.7), (2, 0.61), (3, 0.59))]
    gap = difference(scattered["SRPO"], scattered["LeapAlign"], at_end("judge"))
    assert gap.value < 0 < gap.high  # below zero, and within chance of it
    assert claims(scattered, ["a", "b"])[0].verdict == "undecided"


def write_benchmark(models: tiny.Models, features: Path, folder: Path) -> Path:
    fit = tiny.config(models, folder, features)
    objective = fit["model"].pop("objective")
    tracking = [c for c in fit["trainer"]["callbacks"] if c["class_path"].endswith("RewardTracking")]
    tracking[0]["init_args"]["form"] = {"class_path": "srpo_lightning.objectives.Plain"}
    fit["trainer"]["callbacks"] = tracking
    config = {
        "folder": str(folder / "benchmark"),
        "seeds": [0, 1, 2],
        "learning_rates": [1e-3, 1e-4],
        "forwards": 32,
        "evaluations": 2,
        "label": "x",
        "target": 2.0,
        "fit": fit,
        "rows": {
            "SRPO": {"objective": objective},
            "ReFL": {
                "objective": {
                    "class_path": "srpo_lightning.objectives.ReFL",
                    "init_args": {"num_steps": 2, "late_steps": [1, 1]},
                },
                "learning_rate_of": "SRPO",
                "num_seeds": 1,
            },
            "absent": {"objective": objective, "needs": str(folder / "nothing")},
        },
    }
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_benchmark_runs_every_row_once_and_goes_on_where_it_was_stopped(models, features, tmp_path, capsys):
    config = write_benchmark(models, features, tmp_path)
    arguments = ["--config", str(config), "--num_workers", "1"]
    main(arguments)
    printed = capsys.readouterr().out
    folder = tmp_path / "benchmark"
    result = json.loads((folder / "results.json").read_text())
    assert {name: len(curves) for name, curves in result["rows"].items()} == {"base": 2, "SRPO": 2, "ReFL": 1}
    assert {run["seed"] for run in result["rows"]["SRPO"]} == {1, 2}  # the seed that chose the rate is not in the mean
    assert [run["learning_rate"] for run in result["sweeps"]["SRPO"]] == [1e-4, 1e-3]
    for curves in (result["rows"]["SRPO"], result["rows"]["ReFL"]):
        for run in curves:
            assert [point["forwards"] for point in run["points"]] == [0, 16, 32]
            assert run["points"][2]["seconds"] > 0
            assert run["peak_bytes"] > 2**20
    same = {run["points"][0]["judge"] for run in (result["rows"]["SRPO"][0], result["rows"]["ReFL"][0])}
    assert len(same) == 1  # the base of a seed is measured once
    assert "absent is left out" in printed
    assert (folder / "curves.png").is_file()
    assert not list(folder.rglob("*.ckpt"))
    text = (folder / "table.md").read_text()
    assert "| ReFL | 0.001 |" in text or "| ReFL | 0.0001 |" in text
    assert "not measured" in text

    main([*arguments, "--report_only", "true"])
    assert (folder / "table.md").read_text() == text
    for lost in folder.glob("refl/**/metrics.jsonl"):
        lost.unlink()
    archive = folder / "runs.jsonl"
    kept = [line for line in archive.read_text().splitlines() if "/refl/" not in line]
    assert len(kept) == 3 + 2 + 2  # bases, the sweep, SRPO
    archive.write_text("\n".join(kept) + "\n")
    capsys.readouterr()
    main(arguments)
    assert capsys.readouterr().out.count("seed-") == 1
    main([*arguments, "--folder", str(tmp_path / "there"), "--archive", str(archive)])
    assert "seed-" not in capsys.readouterr().out  # what another machine has done is not done again
    assert (tmp_path / "there" / "table.md").read_text() == (folder / "table.md").read_text()

    # A part of the plan is reported with the same base, and without one where nobody has measured it.
    whole = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(whole | {"rows": {"SRPO, alone": whole["rows"]["SRPO"]}}))
    main([*arguments, "--report_only", "true"])
    assert json.loads((folder / "results.json").read_text())["rows"].keys() == {"base", "SRPO, alone"}
    archive.write_text("".join(line + "\n" for line in kept if "/base/" not in line))
    main([*arguments, "--report_only", "true"])
    assert json.loads((folder / "results.json").read_text())["rows"].keys() == {"SRPO, alone"}
    capsys.readouterr()
    main(arguments)
    assert json.loads((folder / "results.json").read_text())["rows"].keys() == {"base", "SRPO, alone"}
    assert "/base/" not in capsys.readouterr().out  # what is measured, but not kept, is not measured again
    config.write_text(yaml.safe_dump(whole))

    config.write_text(config.read_text().replace("num_sample_steps: 2", "num_sample_steps: 3"))
    with pytest.raises(SystemExit, match="was run with other settings: delete it"):
        main(arguments)


def test_a_run_that_is_refused_says_why(models, features, tmp_path, capsys):
    config = write_benchmark(models, features, tmp_path)
    settings = yaml.safe_load(config.read_text())
    settings["fit"]["model"]["policy"]["init_args"]["depth"] = 3
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit, match="the weights before training could not be evaluated"):
        main(["--config", str(config), "--num_workers", "1"])
    assert "depth: there is no such setting" in capsys.readouterr().out


def test_conditions_are_compared_beside_each_other(models, features, tmp_path):
    config = write_benchmark(models, features, tmp_path)
    settings = yaml.safe_load(config.read_text())
    settings |= {"seeds": [0], "evaluations": 1, "learning_rates": [1e-4, 1e-3]}
    settings["rows"] = {
        "SRPO": settings["rows"]["SRPO"] | {"learning_rates": [1e-3]},
        "other": settings["rows"]["SRPO"] | {"is_reference": True},
    }
    decays = [{"model": {"optimizer": {"init_args": {"weight_decay": decay}}}} for decay in (0.1, 0.2)]
    settings["conditions"] = {
        "weak": {"strength": 1, "settings": decays[0]},
        "strong": {"settings": decays[1], "between": ["weak"]},
    }
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    main(["--config", str(config), "--num_workers", "1"])
    folder = tmp_path / "benchmark"
    assert "| | weak | strong | ahead from |" in (folder / "conditions.md").read_text()
    assert (folder / "conditions.png").is_file()
    tried = [json.loads((folder / name / "results.json").read_text())["sweeps"]["other"] for name in ("weak", "strong")]
    best = max(tried[0], key=lambda curve: curve["points"][-1]["judge"])
    assert len(tried[0]) >= 2
    rates = {curve["learning_rate"] for curve in tried[1]}  # SRPO's, with the same settings, is the same run
    assert rates == {best["learning_rate"], 1e-3}


def test_a_benchmark_that_is_terminated_takes_its_runs_with_it(models, features, tmp_path):
    config = write_benchmark(models, features, tmp_path)
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(settings | {"forwards": 32_000, "seeds": [0]}))
    process = processes.launch(["--config", str(config), "--num_workers", "2"], tmp_path / "log.txt", program=PROGRAM)
    logs = list((tmp_path / "benchmark" / "srpo").glob("*/log.txt"))
    deadline = time.monotonic() + processes.LIMIT_S
    while not any("s per step" in log.read_text() for log in logs) and time.monotonic() < deadline:
        time.sleep(0.2)
        logs = list((tmp_path / "benchmark" / "srpo").glob("*/log.txt"))
    process.terminate()
    process.join(processes.LIMIT_S)
    assert process.exitcode == 128 + signal.SIGTERM
    saved = list((tmp_path / "benchmark" / "srpo").glob("*/checkpoints/*.ckpt"))
    assert saved, [log.read_text() for log in logs]
    before = [log.read_text() for log in logs]
    time.sleep(1)
    assert [log.read_text() for log in logs] == before


def test_a_benchmark_without_tracking_or_results_is_refused_with_the_cure(models, features, tmp_path):
    config = write_benchmark(models, features, tmp_path)
    arguments = ["--config", str(config), "--report_only", "true"]
    with pytest.raises(SystemExit, match="leave --report_only out"):
        main(arguments)
    settings = yaml.safe_load(config.read_text())
    del settings["fit"]["trainer"]["callbacks"][0]["init_args"]["form"]
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit, match="compares nothing: give it one"):
        main(arguments)
    settings["fit"]["trainer"]["callbacks"] = []
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit, match="add it, with labels"):
        main(arguments)


@pytest.mark.parametrize("file", PLANS, ids=lambda path: path.stem)
def test_every_plans_rows_are_what_fit_would_take(file, capsys, monkeypatch, tmp_path):
    """Each row's objective is made and its steps counted before anything is trained."""
    monkeypatch.chdir(REPOSITORY)
    empty = ["--folder", str(tmp_path), "--archive", str(tmp_path / "runs.jsonl")]
    with pytest.raises(SystemExit, match="to report on"):
        main(["--config", str(file), *empty, "--report_only", "true"])
    settings = yaml.safe_load(file.read_text())
    objective = next(iter(settings["rows"].values()))["objective"]
    config = tmp_path / "fit.yaml"
    config.write_text(yaml.safe_dump(settings["fit"] | {"model": settings["fit"]["model"] | {"objective": objective}}))
    with pytest.raises(SystemExit) as exit_status:
        cli.main(["fit", "--config", str(config), "--print_config"])
    assert exit_status.value.code == 0
