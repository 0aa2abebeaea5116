"""Whatever is odd in a configuration ends in one line that names it, before anything is read, or does what it says.

A case is a line of odd_configurations.txt: what is added to `fit` of the tiny run, `=>`, and words of the message. A
line that begins with `$` is a whole command line, one with `{` a second configuration file. `=> ok: EXPRESSION` is a
run that is taken, of which the expression is true.
"""

import json
import shlex
import warnings
from pathlib import Path

import pytest
import torch

from srpo_lightning.cli import main
from srpo_lightning.data import PromptData
from srpo_lightning.trainer_cli import SRPOCLI
from tests import tiny

CASES = [
    tuple(part.strip() for part in line.rsplit("=>", 1))
    for line in Path(__file__).with_name("odd_configurations.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]


class TakenError(Exception):
    """A run has come to where it would read something."""


@pytest.fixture(scope="module")
def files(models, tmp_path_factory) -> dict[str, str]:
    """What stands in the place of `@NAME` in a case."""
    folder = tmp_path_factory.mktemp("odd")
    settings = tiny.config(models, folder / "run", folder / "features")
    average, _, tracking, _ = settings["trainer"]["callbacks"]
    settings["trainer"]["callbacks"] = [average, tracking]  # the others take time and refuse nothing
    (config := folder / "config.yaml").write_text(json.dumps(settings))
    own = {"empty.yaml": "", "broken.yaml": "a: [1", "text.yaml": "just text", "loop.yaml": "data: {train: &a [*a]}",
           "code.yaml": 'a: !!python/object/apply:os.system ["true"]', "binary.yaml": None}  # fmt: skip
    for name, text in own.items():
        (folder / name).write_bytes(b"\xff\x00" if text is None else text.encode())
    named = {f"@{Path(name).stem.upper()}": str(folder / name) for name in own}
    return named | {"@CONFIG": str(config), "@CLIP": str(models.clip), "@JUDGE": str(models.judge),
                    "@FLUX": str(models.pipeline), "@FOLDER": str(folder)}  # fmt: skip


@pytest.fixture(scope="module")
def parsers() -> dict[str | None, dict]:
    """The parser of each command, which takes longer to make than all the rest."""
    return {}


@pytest.fixture
def command_line(files, parsers, monkeypatch):
    """Stops where something would be read, and makes each parser once."""
    make = SRPOCLI.setup_parser

    def setup(self, *args) -> None:
        if self.command not in parsers:
            make(self, *args)
            names = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
            parsers[self.command] = {name: vars(self)[name] for name in names}
        vars(self).update(parsers[self.command])

    def prepare(self) -> None:
        raise TakenError(self.trainer)

    monkeypatch.setattr(SRPOCLI, "setup_parser", setup)
    monkeypatch.setattr(PromptData, "prepare_data", prepare)


def with_paths(text: str, files: dict[str, str]) -> str:
    for name, path in files.items():
        text = text.replace(name, path)
    return text


def arguments(case: str, files: dict[str, str], folder: Path) -> list[str]:
    case = with_paths(case, files)
    if case.startswith("$"):
        return shlex.split(case[1:])
    if case.startswith("{"):
        (folder / "odd.yaml").write_text(case)
        return ["fit", "--config", files["@CONFIG"], "--config", str(folder / "odd.yaml")]
    return ["fit", "--config", files["@CONFIG"], *shlex.split(case)]


@pytest.mark.parametrize(("case", "expected"), CASES, ids=[case for case, _ in CASES])
def test_what_is_odd_is_refused_in_one_line_or_does_what_it_says(
    command_line, files, tmp_path, case, expected, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")  # pytest puts the filters back
    with pytest.raises((SystemExit, TakenError)) as ended:
        main(arguments(case, files, tmp_path))
    outcome = ended.value
    if expected.startswith("ok:"):
        assert isinstance(outcome, TakenError), outcome
        (trainer,) = outcome.args
        seen = {"trainer": trainer, "module": trainer.lightning_module, "torch": torch}
        assert eval(expected.removeprefix("ok:"), seen)
    else:
        assert isinstance(outcome, SystemExit), "was taken"
        message = str(outcome.code)
        assert message.startswith("error: ")
        assert "\n" not in message
        assert with_paths(expected, files) in message
    assert {path.name for path in tmp_path.iterdir()} <= {"odd.yaml"}, "nothing is left behind"
