"""What is there without being named: callbacks that show what a run does, and evaluations."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from srpo_lightning.callbacks import EMA
from srpo_lightning.cli import main
from srpo_lightning.config.arguments import read_config
from srpo_lightning.config.defaults import MOST_EVALUATIONS, complete, steps_between
from srpo_lightning.config.shipped import RECIPES
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.refusals import refused

USUAL = ["EMA", "SampleLogger", "RewardTracking", "OverOptimizationGuard", "Report"]
ADAPTER = ["EMA", "LoraExport", *USUAL[1:]]
PAPERS = {"decay": 0.999, "device": "same"}
RUNS = {
    "emoji_demo": (USUAL, {"decay": 0.95, "device": "same"}, 2, 14),
    "emoji_srpo": (USUAL, {"decay": 0.95, "device": "same"}, 2, 12),
    "emoji_srpo_offline": (USUAL, {"decay": 0.95, "device": "same"}, 2, 12),
    "flux_draft": (USUAL, {"decay": 0.995, "device": "same"}, 1, 200),
    "flux_grpo": (USUAL, PAPERS, 1, 60),
    "flux_refl": (USUAL, {"decay": 0.995, "device": "same"}, 1, 200),
    "flux_srpo": (USUAL, PAPERS, 1, 20),
    "flux_srpo_1gpu": (USUAL, {"decay": 0.999, "device": "host"}, 1, 160),
    "flux_srpo_lora": (ADAPTER, PAPERS, 1, 160),
    "flux_srpo_multinode": (USUAL, PAPERS, 1, 10),
    "flux_srpo_qlora": (ADAPTER, PAPERS, 1, 160),
    "moving_demo": (USUAL, {"decay": 0.95, "device": "same"}, 2, 40),
}
"""What recipes held when they still named it: callbacks, their average, the scale of the report, the interval."""


def names(settings) -> list[str]:
    return [own.class_path.rpartition(".")[2] for own in settings.trainer.callbacks]


def as_json(settings) -> str:
    """In which a tuple is a list; what `fit` alone sets is left out."""
    return json.dumps(settings.as_dict() | {"weights_only": None}, default=str)


def of(settings, name):
    (found,) = [own for own in settings.trainer.callbacks if own.class_path.endswith(f".{name}")]
    return found.init_args


@pytest.fixture
def small(models, features, tmp_path):
    """Writes the tiny run's configuration without callbacks and without a word of evaluations, changed."""

    def write(callbacks=None, **trainer) -> str:
        settings = tiny.config(models, tmp_path / "run", features)
        del settings["default_callbacks"]
        for name in ("callbacks", "num_sanity_val_steps", "check_val_every_n_epoch", "val_check_interval"):
            del settings["trainer"][name]
        settings["trainer"] |= trainer | ({} if callbacks is None else {"callbacks": callbacks})
        path = tmp_path / "small.yaml"
        path.write_text(json.dumps(settings))
        return str(path)

    return write


def test_recipes_mean_what_they_meant_when_they_named_everything():
    found = {}
    for name in RUNS:
        settings = read_config(str(RECIPES / f"{name}.yaml"))
        trainer, average = settings.trainer, of(settings, "EMA")
        assert (trainer.num_sanity_val_steps, trainer.check_val_every_n_epoch, trainer.log_every_n_steps) == (
            -1,
            None,
            1,
        )
        assert trainer.accelerator == "auto"
        kept = {"decay": average.decay, "device": average.device}
        found[name] = names(settings), kept, of(settings, "Report").scale, trainer.val_check_interval
    assert found == RUNS
    assert {path.stem for path in RECIPES.glob("*.yaml")} == RUNS.keys()


@pytest.mark.parametrize("recipe", RUNS)
def test_recipes_name_nothing_that_is_the_default(recipe):
    trainer = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["trainer"]
    assert not trainer.keys() & {"num_sanity_val_steps", "check_val_every_n_epoch", "log_every_n_steps", "accelerator"}
    assert all("init_args" in own for own in trainer["callbacks"])


@given(st.integers(1, 1000))
def test_the_last_step_is_evaluated_and_few_others(steps):
    assert steps % steps_between(steps) == 0
    assert steps // steps_between(steps) <= MOST_EVALUATIONS


def test_about_four_evaluations_are_made():
    assert [steps_between(steps) for steps in (1, 2, 20, 36, 42, 300, 41)] == [1, 1, 5, 9, 14, 75, 41]


def test_a_configuration_without_callbacks_shows_what_it_does(small, tmp_path):
    """And goes on; `validate` measures it; a page is there. There is no judge, so the reward alone is scored."""
    config = small(accumulate_grad_batches=2)
    main(["fit", "--config", config])
    run = RunFolder(tmp_path / "run")
    records = run.read_metrics()
    kinds = [(r["step"], r["weights"]) for r in records]
    assert kinds == [(0, "policy"), *((step, kind) for step in range(1, 5) for kind in ("policy", "ema"))]
    numbers = {"reward", "saturation", "brightness", "high_frequency"}
    assert records[-1].keys() == {"step", "weights", *numbers, "win/reward"}
    assert (run.path / "report.html").is_file()
    assert "| reward |" in (run.path / "report.md").read_text()
    assert run.samples.picture(4, "ema", 2).is_file()
    written = yaml.safe_load((run.path / "config.yaml").read_text())
    assert written["trainer"]["val_check_interval"] == 2
    assert [own["class_path"].rpartition(".")[2] for own in written["trainer"]["callbacks"]] == [
        "EMA", "SampleLogger", "RewardTracking", "Report",
    ]  # fmt: skip
    main(["validate", "--config", str(run.path / "config.yaml"), "--ckpt_path", "last"])
    assert run.validation.read_metrics()[-1]["reward"] == records[-1]["reward"]


def test_what_was_written_down_is_read_as_it_was(small, tmp_path, capsys):
    """--print_config, which shows what is on without being named, is a configuration like any other."""
    first = read_config(small())
    with pytest.raises(SystemExit):
        main(["fit", "--config", small(), "--print_config"])
    (printed := tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    again = read_config(str(printed))
    assert as_json(again) == as_json(first)
    complete(again)
    assert as_json(again) == as_json(first)


def test_a_class_that_is_named_is_the_configurations_own(small):
    own = {"class_path": "tests.config.test_defaults.SlowAverage", "init_args": {"decay": 0.5}}
    report = {"class_path": "srpo_lightning.callbacks.Report", "init_args": {"scale": 3}}
    settings = read_config(small([report, own]))
    assert names(settings) == ["SampleLogger", "RewardTracking", "Report", "SlowAverage"]
    assert (of(settings, "Report").scale, of(settings, "SlowAverage").decay) == (3, 0.5)
    single = read_config(small(), *[small(report)])
    assert names(single) == ["EMA", "SampleLogger", "RewardTracking", "Report"]


class SlowAverage(EMA):
    """A class of one's own in the place of the usual one."""


def test_they_can_be_left_out(small, tmp_path):
    (out := tmp_path / "out.yaml").write_text("default_callbacks: false")
    assert read_config(small(), str(out)).trainer.callbacks is None
    assert names(read_config(small(limit_val_batches=0))) == ["EMA"]


def test_the_guard_needs_a_judge_and_evaluations_while_training(small, models):
    judge = {"class_path": "ClipReward", "init_args": {"pretrained": str(models.judge)}}
    tracking = {"class_path": "srpo_lightning.callbacks.RewardTracking", "init_args": {"judge": judge}}
    average = {"class_path": "srpo_lightning.callbacks.EMA", "init_args": {"evaluate": "ema"}}
    assert names(read_config(small([tracking]))) == USUAL
    assert of(read_config(small([tracking])), "OverOptimizationGuard").weights == "policy"
    assert of(read_config(small([tracking, average])), "OverOptimizationGuard").weights == "ema"
    for late in ({"val_check_interval": 100}, {"check_val_every_n_epoch": 1}):
        assert "OverOptimizationGuard" not in names(read_config(small([tracking], **late)))
    assert "OverOptimizationGuard" in names(read_config(small([tracking], max_steps=-1, max_time="00:01:00:00")))


def test_what_is_said_of_evaluations_counts(small):
    assert read_config(small(val_check_interval=3)).trainer.val_check_interval == 3
    epochs = read_config(small(limit_train_batches=4)).trainer
    assert (epochs.check_val_every_n_epoch, epochs.val_check_interval) == (1, None)
    by_clock = read_config(small(max_steps=-1, max_time="00:01:00:00", accumulate_grad_batches=2)).trainer
    assert by_clock.val_check_interval == 100


@pytest.mark.parametrize(
    ("callbacks", "cure"),
    [
        (
            [{"class_path": "RewardTracking", "init_args": {"labels": ["x", "z"]}}],
            "compared by the judge, and there is",
        ),
        ([{"class_path": "RewardTracking", "init_args": {"held_out": {"judge": 1}}}], r"\(there is no judge\) in metr"),
        ([{"class_path": "OverOptimizationGuard"}], "RewardTracking has no judge to measure it: give it one"),
    ],
    ids=["labels", "held_out", "guard"],
)
def test_what_needs_a_judge_is_refused_without_one(small, callbacks, cure, capsys):
    named = [own | {"class_path": f"srpo_lightning.callbacks.{own['class_path']}"} for own in callbacks]
    refused(["fit", "--config", small(named)], cure, capsys)


def test_metrics_may_make_the_held_out_score_without_a_judge(small, models, tmp_path):
    metric = {"class_path": "ClipReward", "init_args": {"pretrained": str(models.judge)}}
    own = {"metrics": {"other": metric}, "held_out": {"other": 2.0}}
    tracking = {"class_path": "srpo_lightning.callbacks.RewardTracking", "init_args": own}
    main(["fit", "--config", small([tracking], max_steps=1)])
    record = RunFolder(tmp_path / "run").read_metrics()[-1]
    assert record["held_out"] == pytest.approx(2 * record["other"], rel=1e-5)
    assert "judge" not in record
