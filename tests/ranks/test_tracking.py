"""What is measured by two gloo processes against one, with a last batch that is not whole."""

import json
from pathlib import Path

import pytest
import torch

from srpo_lightning.evaluation.comparison import read_table
from srpo_lightning.run_folder import RunFolder
from tests import processes, tiny


def validate(models, features, folder: Path, devices: int) -> Path:
    """Five prompts, two at a time: batches of 2, 2, 1 in one process, of 2, 1 on either of two ranks."""
    run = folder / f"run{devices}"
    settings = tiny.config(models, run, features)
    (folder / "eval.txt").write_text("\n".join(f"c{i}" for i in range(5)))
    settings["data"]["evaluation"] = str(folder / "eval.txt")
    settings["trainer"] |= {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    config = folder / f"config{devices}.json"
    config.write_text(json.dumps(settings))
    done = processes.start(["validate", "--config", str(config)], devices)
    assert done.returncode == 0, done.output
    return run / "validation"


@pytest.fixture(scope="module")
def runs(models, features, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tracking")
    return [validate(models, features, folder, devices) for devices in (1, 2)]


def test_two_ranks_measure_what_one_measures_and_every_sample_once(runs):
    one, two = (read_table(RunFolder(run).table(0, "policy")) for run in runs)
    assert two.indices.tolist() == [0, 1, 2, 3, 4]
    for name, column in one.columns.items():
        torch.testing.assert_close(two.columns[name], column, rtol=0, atol=1e-6)
    torch.testing.assert_close(two.features, one.features, rtol=0, atol=1e-5)


def test_two_ranks_report_what_one_reports(runs):
    one, two = (json.loads((run / "step-00000000.json").read_text())["compared"] for run in runs)
    for name, measure in one["all"]["policy"].items():
        assert two["all"]["policy"][name]["mean"] == pytest.approx(measure["mean"], abs=1e-6)
    records = [json.loads((run / "metrics.jsonl").read_text()) for run in runs]
    for name, value in records[0].items():
        assert records[1][name] == (value if name in ("weights", "key") else pytest.approx(value, abs=1e-6)), name


def test_every_picture_is_there_and_described_once(runs):
    for run in runs:
        lines = [json.loads(line) for line in (run / "samples" / "metadata.jsonl").read_text().splitlines()]
        assert sorted(line["index"] for line in lines) == [0, 1, 2, 3, 4]
        assert all((run / "samples" / line["file"]).is_file() for line in lines)
