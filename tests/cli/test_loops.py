"""Limits and epochs of Lightning's trainer: what they mean here, or that they are refused."""

import json

import pytest
import torch

from srpo_lightning.cli import main
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.refusals import refused


@pytest.fixture
def config(models, features, tmp_path) -> str:
    return str(tiny.write_config(models, tmp_path / "run", features))


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        (
            ["max_steps=-1"],
            "the stream of prompts has no end: set it, usually to 20 for all weights .* or 40 for an ad",
        ),
        (["max_epochs=1"], "no epochs: set trainer.max_steps .*, or give epochs a length with trainer.limit_train_b"),
        (["num_sanity_val_steps=2"], "set it to -1 for all of it, or to 0 for none, and data.num_eval_prompts"),
        (["limit_val_batches=1"], "leave it out .* set data.num_eval_prompts"),
        (["limit_val_batches=0.5"], "leave it out .* set data.num_eval_prompts"),
        (["limit_train_batches=0.5"], "set trainer.max_steps, or a whole number of batches per epoch"),
        (["limit_train_batches=5", "accumulate_grad_batches=2"], "5, which .* 2, does not divide: .* set it to 6"),
        (["accumulate_grad_batches=3"], "2 micro-batches, which .* 3, does not divide: .* set it to 3"),
        (["overfit_batches=2"], "set data.train to a file with the few prompts"),
        (["enable_checkpointing=false"], "leave it out, and set checkpoint.every_n_steps"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_lightning_would_not_understand_is_refused(config, tmp_path, capsys, flags, cure):
    refused(["fit", "--config", config, *(f"--trainer.{flag}" for flag in flags)], cure, capsys)
    assert not (tmp_path / "run").exists()


def test_a_scheduler_that_waits_for_a_metric_is_refused(config, capsys):
    name = "lightning.pytorch.cli.ReduceLROnPlateau"
    flags = ["--model.lr_scheduler", name, "--model.lr_scheduler.monitor", "x"]
    refused(["fit", "--config", config, *flags], "ReduceLROnPlateau, .*: take one that counts steps", capsys)


def run(models, features, folder, *flags: str) -> list:
    """A run without evaluation that writes down its prompts."""
    settings = tiny.config(models, folder, features)
    log = folder.with_suffix(".jsonl")
    prompts = {"class_path": "tests.faults.PromptLog", "init_args": {"path": str(log)}}
    settings["trainer"] |= {"callbacks": [prompts], "limit_val_batches": 0, "max_steps": 7}
    folder.with_suffix(".yaml").write_text(json.dumps(settings))
    main(["fit", "--config", str(folder.with_suffix(".yaml")), *flags])
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_epochs_that_a_limit_makes_go_through_the_prompts_as_one_run_does(models, features, tmp_path):
    """Also resumed at the end of an epoch and within one; max_epochs counts them."""
    whole = run(models, features, tmp_path / "whole")
    assert [step for step, _ in whole] == list(range(7))
    limit = "--trainer.limit_train_batches=3"
    assert run(models, features, tmp_path / "limited", limit) == whole
    assert run(models, features, tmp_path / "epochs", limit, "--trainer.max_epochs=2") == whole[:6]
    for steps in (3, 4):
        folder = tmp_path / f"resumed-{steps}"
        run(models, features, folder, limit, f"--trainer.max_steps={steps}")
        assert run(models, features, folder, limit, "--ckpt_path=last") == whole
        a, b = (torch.load(RunFolder(f).checkpoint(7), weights_only=True) for f in (tmp_path / "whole", folder))
        assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])


def test_a_run_to_try_a_configuration_leaves_nothing_that_is_in_the_way(config, tmp_path, capsys):
    for _ in range(2):
        main(["fit", "--config", config, "--trainer.fast_dev_run=2"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["fast_dev_run"]
    assert not RunFolder(tmp_path / "run" / "fast_dev_run").checkpoints()
    main(["fit", "--config", config, "--trainer.max_steps=1"])
    main(["fit", "--config", config, "--trainer.fast_dev_run=1", "--ckpt_path=last"])
    assert len(RunFolder(tmp_path / "run").checkpoints()) == 1
