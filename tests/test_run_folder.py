"""The names of a run's files, which other programs and older runs rely on, and what is read under them."""

import math
from pathlib import Path

import pytest

from srpo_lightning.run_folder import PictureFolder, RunFolder

RUN = RunFolder("run")
NAMES = {
    "run/config.yaml": RUN.config(),
    "run/config-step-00000002.yaml": RUN.config(RUN.checkpoint(2)),
    "run/recipe.json": RUN.recipe,
    "run/logs": RUN.logs,
    "run/checkpoints/step-00000002.ckpt": RUN.checkpoint(2),
    "run/metrics.jsonl": RUN.metrics,
    "run/guard.jsonl": RUN.advice,
    "run/tables/prompts.json": RUN.prompts,
    "run/tables/step-00000002/ema.safetensors": RUN.table(2, "ema"),
    "run/tables/base.safetensors": RUN.base_table,
    "run/samples/step-00000002/ema/00007.png": RUN.samples.picture(2, "ema", 7),
    "run/samples/metadata.jsonl": RUN.samples.metadata,
    "run/predictions/step-00000002/ema/00007.png": RUN.predictions.picture(2, "ema", 7),
    "run/predictions/metadata.jsonl": RUN.predictions.metadata,
    "run/lora/step-00000002": RUN.lora(2),
    "run/report.md": RUN.report,
    "run/report.html": RUN.page,
    "run/before_after.png": RUN.sheet,
    "run/validation/metrics.jsonl": RUN.validation.metrics,
    "run/validation/step-00000002": RUN.validation.comparison(2),
    "run/fast_dev_run/metrics.jsonl": RUN.trial.metrics,
}


@pytest.mark.parametrize("name", NAMES)
def test_files_keep_their_names(name):
    assert NAMES[name] == Path(name)


def test_checkpoints_are_whole_ones_oldest_first_and_the_best_are_by_their_numbers(tmp_path):
    run = RunFolder(tmp_path)
    for step, judge in ((100, math.nan), (20, 0.1), (9, 0.3)):
        run.checkpoint(step).parent.mkdir(exist_ok=True)
        run.checkpoint(step).touch()
        run.append_metrics({"step": step, "weights": "ema", "judge": judge})
    run.checkpoint(200).with_suffix(".ckpt.partial-here-1").touch()
    assert run.checkpoints() == [run.checkpoint(step) for step in (9, 20, 100)]
    assert run.ranked_checkpoints("ema/judge", "max") == [run.checkpoint(step) for step in (9, 20)]
    assert run.find_checkpoint("best", "ema/judge", "min") == run.checkpoint(20)
    run.discard_checkpoints()
    assert run.checkpoints() == []
    assert len(run.read_metrics()) == 3


def test_a_run_that_was_moved_is_found_beside_its_configuration(tmp_path):
    moved = RunFolder(tmp_path / "moved")
    moved.checkpoint(1).parent.mkdir(parents=True)
    assert RunFolder.of_config(moved.config(), "elsewhere").path == moved.path
    assert RunFolder.of_config(tmp_path / "config.yaml", "elsewhere").path == Path("elsewhere")


def test_pictures_are_listed_by_step_weights_and_index(tmp_path):
    folder = PictureFolder(tmp_path)
    wanted = [folder.picture(*of) for of in ((0, "policy", 1), (10, "ema", 0), (10, "policy", 0))]
    for path in reversed(wanted):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder.metadata.touch()
    assert folder.pictures() == wanted
    assert [path.relative_to(tmp_path).as_posix() for path in wanted] == [
        folder.name(*of) for of in ((0, "policy", 1), (10, "ema", 0), (10, "policy", 0))
    ]


def test_a_folder_and_a_checkpoint_may_begin_with_a_tilde(tmp_path, monkeypatch):
    """As Lightning reads its own default_root_dir."""
    monkeypatch.setenv("HOME", str(tmp_path))
    run = RunFolder("~/run")
    assert run.path == tmp_path / "run"
    run.checkpoint(3).parent.mkdir(parents=True)
    run.checkpoint(3).touch()
    assert run.find_checkpoint("~/run/checkpoints/step-00000003.ckpt", None, "max") == run.checkpoint(3)
