"""The table of docs/official_run.md against configs/flux_srpo.yaml, defaults included."""

import contextlib
import io
import re
from pathlib import Path
from unittest import mock

import pytest
import yaml

from srpo_lightning.cli import main

REPOSITORY = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (REPOSITORY / "docs" / "official_run.md").read_text().splitlines()
    if line.startswith("| `")
]


def value(text: str) -> object:
    found = yaml.safe_load(re.search(r"`([^`]+)`", text)[1])
    return float(found) if isinstance(found, str) and re.fullmatch(r"[\d.]+e-\d+", found) else found


@pytest.fixture(scope="module")
def config():
    out, argv = io.StringIO(), mock.patch("sys.argv", ["srpo_lightning"])
    with argv, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(["fit", "--config", str(REPOSITORY / "configs" / "flux_srpo.yaml"), "--print_config"])
    return yaml.safe_load(out.getvalue())


@pytest.mark.parametrize(("official", "ours", "reason"), [(*row, "")[:3] for row in ROWS], ids=lambda cell: cell[:30])
def test_every_setting_is_the_official_one_or_says_why_not(config, official, ours, reason):
    path, _, text = re.search(r"`([\w.]+)(: )([^`]+)`", ours).groups()
    found = config
    for key in path.split("."):
        found = found[key]
    assert found == value(f"`{text}`"), path
    assert (found == value(official)) or len(reason.strip(" |")) > 20, f"{path} is {found}, officially {official}"


def test_the_table_names_every_setting_of_the_objective_and_the_optimizer(config):
    named = {re.search(r"`([\w.]+): ", ours)[1] for _, ours, *_ in ROWS}
    objective = {f"model.objective.init_args.{key}" for key in config["model"]["objective"]["init_args"]}
    assert objective - named == {"model.objective.init_args.control_words"}
    words = config["model"]["objective"]["init_args"]["control_words"]
    # S: lists that a step takes word `step % length` of, from step 1.
    realism, cg = (
        ["Natural-lighting", "Detail", "Detailed", "Real"],
        ["Concept art", "Painting", "Anime", "Flat", "Oil"],
    )
    for ours, official in ((words["positive"], realism), (words["negative"], cg)):
        assert [ours[step % len(ours)] for step in range(20)] == [
            official[(step + 1) % len(ours)] for step in range(20)
        ]
