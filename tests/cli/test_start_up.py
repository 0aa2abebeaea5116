"""What a command imports: no more than it needs, so that help and the refusal of a typo come at once."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from srpo_lightning import __version__
from srpo_lightning.cli import JOBS
from srpo_lightning.config.names import ALWAYS, COMMANDS, OWNERS, callee, check_files, check_options, known_names
from srpo_lightning.suggestions import moved
from srpo_lightning.trainer_cli import SRPOCLI, run_trainer
from tests.refusals import refused

REPOSITORY = Path(__file__).parents[2]
HEAVY = [
    *(
        "accelerate",
        "bitsandbytes",
        "boto3",
        "diffusers",
        "jsonargparse",
        "lightning",
        "litdata",
        "matplotlib",
    ),
    *("numpy", "peft", "pyarrow", "torch", "torchao", "torchmetrics", "transformers"),
]
IMPORTED = """
import sys
from srpo_lightning.cli import main
try:
    main()
finally:
    print("imported:", *sorted(set(sys.argv.pop().split(",")) & set(sys.modules)))
"""


def imported(arguments: list[str], names: list[str]) -> tuple[set[str], str]:
    """Which of the named modules a process has imported when the command line has ended, and all that it printed."""
    program = [sys.executable, "-c", IMPORTED.replace("main()", f"main({arguments})"), ",".join(names)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    line = next(line for line in done.stdout.splitlines() if line.startswith("imported:"))
    return set(line.split()[1:]), done.stdout + done.stderr


def test_the_console_script_finds_modules_in_the_working_directory(tmp_path):
    """As `python -m` does; -P leaves the directory out of the path, as a script in a folder of its own has it."""
    (tmp_path / "my_rewards.py").write_text("")
    program = "from srpo_lightning.__main__ import program; program(); import my_rewards"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, "--version"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.stdout, done.returncode) == (f"srpo-lightning {__version__}\n", 0), done.stderr
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"srpo": "srpo_lightning.__main__:program"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--help"], "export         Write a checkpoint"),
        (["trian"], "trian: there is no such command"),
        (
            ["fit", "--config", "configs/emoji_srpo.yaml", "--trainer.max_stepps", "3"],
            "did you mean trainer.max_steps?",
        ),
        (["predict", "--modle.seed", "3"], "did you mean model.seed?"),
        (["export", "--outptu", "x"], "did you mean output?"),
    ],
    ids=["help", "command", "setting", "group", "job"],
)
def test_help_and_the_refusal_of_a_typo_import_no_library(arguments, told):
    heavy, output = imported(arguments, HEAVY)
    assert told in output
    assert heavy == set()


def test_a_typo_in_a_file_is_refused_as_early(tmp_path):
    (config := tmp_path / "a.yaml").write_text("trainer: {max_stepps: 3}")
    heavy, output = imported(["fit", "--config", str(config)], HEAVY)
    assert "error: trainer.max_stepps: there is no such setting; did you mean trainer.max_steps?" in output
    assert heavy == set()


def test_the_parser_of_training_imports_no_job_no_model_and_no_library_that_only_some_runs_need():
    """What it needs are the signatures of all classes, not the models behind them."""
    models = ["diffusers.models", "transformers.modeling_utils", "transformers.models.clip", "transformers.models.t5"]
    optional = ["accelerate", "bitsandbytes", "boto3", "datasets", "litdata", "peft", "torchao"]
    found, output = imported(["fit", "--help"], [*JOBS.values(), *models, *optional])
    assert found == set()
    lines = output[output.index("usage:") :].splitlines()
    assert lines[0] == "usage: python -m srpo_lightning fit --config FILE [--config FILE ...] [--SETTING VALUE ...]"
    own, theirs = (next(i for i, line in enumerate(lines) if own in line) for own in ("--model.policy", "--trainer."))
    assert own < 50
    assert theirs > len(lines) / 3


class ParsedError(Exception):
    pass


@pytest.mark.parametrize("command", COMMANDS)
def test_the_names_that_are_read_from_files_are_those_of_the_parser(command, monkeypatch):
    """Not one too few, which would refuse what there is; too many only of what is no setting of its own."""
    found = {}

    def keep(self, parser, args) -> None:
        found["parser"] = parser
        raise ParsedError

    monkeypatch.setattr(SRPOCLI, "parse_arguments", keep)
    with pytest.raises(ParsedError):
        run_trainer([command], command)
    settings = {".".join(name.split(".")[:2]) for name in found["parser"].settings}
    known = known_names(command)
    assert settings <= known
    linked = {"model.seed", "data.seed", "data.repeats", "data.encoder"}
    objects = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "self"}
    assert known - settings <= linked | objects | ALWAYS | OWNERS.keys() | COMMANDS.keys()


STRATEGY = {"class_path": "srpo_lightning.strategies.ShardedStrategy", "init_args": {"shard_size": 2}}
NEW_STRATEGY = "srpo_lightning.training.strategies.ShardedStrategy"
OPTIMIZER = "srpo_lightning.low_bit.AdamW8bit"
PLUGIN = "srpo_lightning.checkpoints.AtomicCheckpointIO"
"""Every config.yaml of a run of 0.1 has it."""


@pytest.mark.parametrize("command", ["fit", "export"])
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"trainer": {"strategy": STRATEGY}},
         f"trainer.strategy is {STRATEGY['class_path']}, which is {NEW_STRATEGY} now"),
        ({"model": {"optimizer": OPTIMIZER}},
         f"model.optimizer is {OPTIMIZER}, which is srpo_lightning.training.low_bit.AdamW8bit now"),
        ({"trainer": {"plugins": [{"class_path": PLUGIN}]}},
         f"trainer.plugins is {PLUGIN}, which is srpo_lightning.files.checkpoints.AtomicCheckpointIO now"),
    ],
    ids=["strategy", "optimizer", "plugin"],
)  # fmt: skip
def test_a_configuration_with_the_old_place_of_a_class_is_told_the_new_one(settings, told, command, tmp_path, capsys):
    (config := tmp_path / "config.yaml").write_text(json.dumps(settings))
    refused([command, "--config", str(config)], re.escape(told), capsys)
    assert moved(f"srpo_lightning.training.{OPTIMIZER}") is None


def test_an_option_and_a_command_that_were_moved_are_told_the_new_place(capsys):
    told = f"model.optimizer is {OPTIMIZER}, which is srpo_lightning.training.low_bit.AdamW8bit now"
    refused(["fit", "--model.optimizer", OPTIMIZER], told, capsys)
    refused(["benchmark"], "it is `python -m experiments.objectives` now", capsys)


def test_what_is_no_plain_name_is_left_to_the_parser(tmp_path):
    known = {"config", "trainer", "trainer.max_steps", "trainer.callbacks", "seed"}
    (nested := tmp_path / "a.yaml").write_text("trainer: {callbacks: [{x: 3}], callbacks+: []}\n3: 4")
    (broken := tmp_path / "b.yaml").write_text("a: [1")
    for words in (
        ["--trainer.callbacks.x.y", "3", "--trainer.callbacks+=z", "--seed=3", "--", "-1"],
        ["--trainer.max_st", "3"],  # the beginning of a name is taken for it
        ["--config", str(nested), f"--config={broken}", "-c", "/nowhere.yaml"],
        [],
    ):
        check_options(words, known)
        check_files(words, known)
    check_options(["--nothing"], None)
    with pytest.raises(ValueError, match="nothing: there is no such setting"):
        check_options(["--nothing"], known)


def test_arguments_that_a_file_does_not_tell_are_not_guessed():
    assert callee("tests.cli.test_start_up", "imported").names == {"arguments", "names"}
    assert callee("tests.cli.test_start_up", "nowhere") is None
    assert callee("tests.nowhere", "nowhere") is None
    assert callee("nowhere", "nowhere") is None
    assert callee("srpo_lightning.trainer_cli", "SaveConfigInRunFolder") is None  # it takes any more by **kwargs
