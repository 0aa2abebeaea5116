"""`main([...])` in this process, on the tiny models."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from srpo_lightning.cli import main
from srpo_lightning.run_folder import RunFolder
from tests import tiny


@pytest.fixture
def config(models, features, tmp_path) -> str:
    return str(tiny.write_config(models, tmp_path / "run", features))


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def finished(models, features, tmp_path_factory) -> tuple[str, Path]:
    """A configuration and the folder of its finished run of four steps."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["srpo_lightning"])
        config = str(tiny.write_config(models, run, features))
        main(["fit", "--config", config])
    return config, run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_fit_leaves_checkpoints_configuration_samples_metrics_and_report(finished):
    _, run = finished
    assert [path.name for path in RunFolder(run).checkpoints()] == ["step-00000002.ckpt", "step-00000004.ckpt"]
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "config.yaml", "recipe.json", "samples", "tables", "logs", "metrics.jsonl", "report.md",
        "report.html", "before_after.png",
    }  # fmt: skip


def test_every_sample_has_its_line_of_metadata(finished):
    """Three prompts, before training and after steps 2 and 4; the ema from its first step on."""
    _, run = finished
    records = lines(run / "samples" / "metadata.jsonl")
    kinds = [(0, "policy"), (2, "ema"), (2, "policy"), (4, "ema"), (4, "policy")]
    assert sorted((r["step"], r["weights"], r["index"]) for r in records) == [(*k, i) for k in kinds for i in range(3)]
    files = {path.relative_to(run / "samples").as_posix() for path in (run / "samples").rglob("*.png")}
    assert {record["file"] for record in records} == files
    assert all(record["seed"] == 3 and record["prompt"] == f"c{record['index']}" for record in records)
    assert picture(run / "samples" / records[0]["file"]).shape == (32, 32, 3)


def test_every_validation_has_its_record_of_metrics(finished):
    _, run = finished
    records = lines(run / "metrics.jsonl")
    assert [(r["step"], r["weights"]) for r in records] == [
        (0, "policy"), (2, "policy"), (2, "ema"), (4, "policy"), (4, "ema"),
    ]  # fmt: skip
    scores = {"reward", "judge", "prompt", "top1", "held_out"}
    names = {*scores, "saturation", "brightness", "high_frequency", "share/x", "share/z", "diversity"}
    against_base = {"drift", *(f"win/{name}" for name in scores)}
    for record in records:
        assert record.keys() == {"step", "weights", *names, *(against_base if record["step"] else ())}
        assert record["share/x"] + record["share/z"] == 1


def test_the_report_compares_the_first_validation_with_the_last(finished):
    _, run = finished
    table = (run / "report.md").read_text()
    assert "| base (step 0) | policy (step 4) | ema (step 4) |" in table
    first, last = lines(run / "metrics.jsonl")[0], lines(run / "metrics.jsonl")[-2]
    assert f"| judge | {first['judge']:.3f} | {last['judge']:.3f} |" in table


def test_the_written_configuration_starts_the_same_run_again(finished, tmp_path):
    """config.yaml alone, in another folder: the same weights, bit for bit."""
    _, run = finished
    main(["fit", "--config", str(run / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "again")])
    a, b = (torch.load(RunFolder(f).checkpoint(4), weights_only=True)["state_dict"] for f in (run, tmp_path / "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_goes_on_and_writes_its_own_configuration(config, run):
    main(["fit", "--config", config, "--trainer.max_steps", "2"])
    main(["fit", "--config", config, "--ckpt_path", "last"])
    assert [path.name for path in RunFolder(run).checkpoints()] == ["step-00000002.ckpt", "step-00000004.ckpt"]
    first, resumed = (yaml.safe_load((run / name).read_text()) for name in ("config.yaml", "config-step-00000002.yaml"))
    assert first["ckpt_path"] is None
    assert (first["trainer"]["max_steps"], resumed["trainer"]["max_steps"]) == (2, 4)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluating_a_checkpoint_finds_the_metrics_that_training_found(finished, tmp_path, command):
    config, run = finished
    main([command, "--config", config, "--ckpt_path", str(RunFolder(run).checkpoint(4)),
          "--trainer.default_root_dir", str(tmp_path / "eval")])  # fmt: skip
    records = lines(tmp_path / "eval" / "validation" / "metrics.jsonl")
    assert len({record.pop("key") for record in records}) == 1
    assert records == lines(run / "metrics.jsonl")[-2:]


def test_best_is_the_checkpoint_with_the_highest_score(finished, tmp_path, capsys):
    config, run = finished
    scores = {r["step"]: r["judge"] for r in lines(run / "metrics.jsonl") if r["weights"] == "ema"}
    folder = shutil.copytree(run, tmp_path / "run")
    main(["validate", "--config", config, "--ckpt_path", "best", "--checkpoint.monitor", "ema/judge",
          "--trainer.default_root_dir", str(folder)])  # fmt: skip
    assert lines(folder / "validation" / "metrics.jsonl")[-1]["step"] == max(scores, key=scores.get)
    for monitor, cure in ((None, "needs checkpoint.monitor"), ("ema/nothing", "was evaluated in checkpoint.monitor")):
        flags = ["--checkpoint.monitor", monitor] if monitor else []
        with pytest.raises(SystemExit, match=cure):
            main(["validate", "--config", config, "--ckpt_path", "best", *flags,
                  "--trainer.default_root_dir", str(folder)])  # fmt: skip


def test_validate_with_other_prompts_leaves_the_run_and_its_best_checkpoint_as_they_are(finished, tmp_path):
    """Every file of it, bit for bit: the records that `best` goes by, tables, the base's among them, pictures, logs."""
    folder = shutil.copytree(finished[1], tmp_path / "run")
    prompts = tmp_path / "others.txt"
    prompts.write_text("d0\nd1")

    def content() -> dict[str, bytes]:
        paths = (path for path in folder.rglob("*") if path.is_file() and "validation" not in path.parts)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    before = content()
    flags = ["--trainer.default_root_dir", str(folder), "--ckpt_path", str(RunFolder(folder).checkpoint(2))]
    for own in (["--data.evaluation", str(prompts)], []):
        main(["validate", "--config", finished[0], *flags, *own])
        assert content() == before
    records = lines(folder / "validation" / "metrics.jsonl")
    assert [(r["step"], r["weights"]) for r in records] == [(2, "policy"), (2, "ema")] * 2
    assert records[0]["key"] == records[1]["key"] != records[2]["key"]
    expected = [r for r in lines(folder / "metrics.jsonl") if r["step"] == 2]
    assert [{name: r[name] for name in r if name != "key"} for r in records[2:]] == expected


def test_predict_writes_a_picture_of_every_prompt_by_both_weights(finished, tmp_path):
    config, run = finished
    main(["predict", "--config", config, "--ckpt_path", str(RunFolder(run).checkpoint(4)),
          "--trainer.default_root_dir", str(tmp_path / "eval")])  # fmt: skip
    pictures = sorted(path.relative_to(tmp_path / "eval").as_posix() for path in tmp_path.rglob("*.png"))
    assert pictures == [f"predictions/step-00000004/{w}/0000{i}.png" for w in ("ema", "policy") for i in range(3)]
    name = "step-00000004/policy/00000.png"
    assert (picture(tmp_path / "eval" / "predictions" / name) == picture(run / "samples" / name)).all()


def test_predict_writes_to_a_folder_of_its_own_and_needs_no_callback(finished, tmp_path):
    settings = json.loads(Path(finished[0]).read_text())
    settings["trainer"]["callbacks"] = []
    (tmp_path / "config.json").write_text(json.dumps(settings))
    main(["predict", "--config", str(tmp_path / "config.json"), "--output", str(tmp_path / "out"),
          "--trainer.default_root_dir", str(tmp_path / "eval")])  # fmt: skip
    assert [path.name for path in sorted((tmp_path / "out").rglob("*.png"))] == [f"0000{i}.png" for i in range(3)]
    assert len(lines(tmp_path / "out" / "metadata.jsonl")) == 3
    assert not list((tmp_path / "eval").rglob("*.png"))


def test_the_default_optimizer_is_the_papers_and_is_written_down(models, features, tmp_path):
    """Step 5; a run without `model.optimizer` starts again from its config.yaml."""
    run = tmp_path / "run"
    settings = tiny.config(models, run, features)
    del settings["model"]["optimizer"]
    settings["trainer"] |= {"max_steps": 1, "limit_val_batches": 0}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    main(["fit", "--config", str(path)])
    saved = torch.load(RunFolder(run).checkpoint(1), weights_only=True)["optimizer_states"][0]["param_groups"][0]
    expected = {"lr": 5e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
    assert {name: tuple(v) if isinstance(v := saved[name], list) else v for name in expected} == expected
    main(["fit", "--config", str(run / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "again")])


def test_another_optimizer_replaces_the_default_with_all_its_settings(config, run):
    main(["fit", "--config", config, "--trainer.max_steps", "1", "--model.optimizer", "torch.optim.SGD",
          "--model.optimizer.init_args.lr", "0.1"])  # fmt: skip
    saved = torch.load(RunFolder(run).checkpoint(1), weights_only=True)["optimizer_states"][0]["param_groups"][0]
    assert (saved["lr"], saved["momentum"]) == (0.1, 0)


@pytest.mark.parametrize("enabled", ["true", "false"])
def test_the_progress_bar_can_be_switched_off_and_on(config, enabled):
    main(["fit", "--config", config, "--trainer.enable_progress_bar", enabled, "--trainer.max_steps", "1"])


def test_a_progress_bar_of_ones_own_is_kept(config):
    main(["fit", "--config", config, "--trainer.enable_progress_bar", "true", "--trainer.max_steps", "1",
          "--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar"])  # fmt: skip


REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_file_parses(file, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as exit_status:
        main(["fit", "--config", str(file), "--print_config"])
    assert exit_status.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    policy = "WanPolicy" if file.stem.startswith("moving") else "FluxPolicy"
    assert parsed["model"]["policy"]["class_path"] == f"srpo_lightning.policies.{policy}"
    assert parsed["weights_only"] is True  # no code is read from a checkpoint


@pytest.mark.parametrize("recipe", ["flux_srpo", "flux_srpo_qlora"])
def test_the_form_with_other_prompts_goes_beside_any_recipe(recipe, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    files = ["--config", f"configs/{recipe}.yaml", "--config", "configs/forms/other_prompts.yaml"]
    with pytest.raises(SystemExit) as exit_status:
        main(["fit", *files, "--print_config"])
    assert exit_status.value.code == 0
    objective = yaml.safe_load(capsys.readouterr().out)["model"]["objective"]
    assert objective["class_path"] == "srpo_lightning.objectives.DirectAlign"
    form = objective["init_args"]["form"]["init_args"]
    assert (form["others"], form["control_words"]["negative"], form["extra_weight"]) == (4, [], 0.0)
