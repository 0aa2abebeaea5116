"""What every test starts from: no network, no chance, warnings as errors (pyproject.toml), and the tiny models."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
os.environ["OMP_NUM_THREADS"] = "1"  # of the subprocesses: their models are far too small for more

import pytest
import torch
from hypothesis import settings

from srpo_lightning.cli import main
from tests import shapes as shapes  # so that --jaxtyping-packages finds it
from tests import tiny

settings.register_profile("srpo", deadline=None, derandomize=True, max_examples=50)  # torch's first call takes long
settings.load_profile("srpo")
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


LONGEST = (
    "tests/families/test_families.py",
    "tests/ranks/test_sharded.py",
    "tests/ranks/test_context.py",
    "tests/jobs/test_estimate.py",
    "tests/test_notebooks.py",
    "tests/experiments/test_objectives.py",
    "tests/ranks/test_agreement.py",
    "tests/jobs/test_export.py",
    "tests/cli/test_flux_run.py",
    "tests/kill/test_kill.py",
    "tests/callbacks/test_checkpoint.py",
    "tests/cli/test_odd_configurations.py",
    "tests/ranks/test_two_ranks.py",
    "tests/policies/test_parallel.py",
    "tests/docs/test_start_pages.py",
    "tests/cli/test_emoji_run.py",
    "tests/cli/test_commands.py",
    "tests/cli/test_family_files.py",
    "tests/ranks/test_host_memory.py",
    "tests/kill/test_cache.py",
    "tests/ranks/test_sharded_export.py",
    "tests/benchmarks/test_gpu.py",
    "tests/cli/test_cache.py",
)
"""Files that take longest, in that order: one that begins last would have all workers but its own wait."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest files, one worker for each (`--dist loadfile --no-loadscope-reorder`)."""
    assert all((config.rootpath / file).is_file() for file in LONGEST), "a file has another name now"
    place = {file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.location[0], len(place)))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tiny.Models:
    """The tiny pipeline, reward, judge and prompt files. Read-only: a test that writes makes its own."""
    folder = tmp_path_factory.mktemp("models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny.write_models(folder)


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature cache that tests share."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="session")
def finished_run(models: tiny.Models, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run of four steps. Read-only."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with mock.patch.dict(os.environ), mock.patch("sys.argv", ["srpo_lightning"]):
        main(["fit", "--config", str(tiny.write_config(models, run, features))])
    return run


@pytest.fixture(autouse=True)
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns where both pytest and a test of `main` bring arguments."""
    monkeypatch.setattr("sys.argv", ["srpo_lightning"])


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """A trainer leaves its rank in the environment, with which a later test's processes would wait for others."""
    with mock.patch.dict(os.environ):
        yield
