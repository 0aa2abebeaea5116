import pytest
import torch

from srpo_lightning.encoding import Encoding
from srpo_lightning.policies import FluxPolicy, family, text_encoder
from srpo_lightning.training.devices import chosen_device
from tests import tiny
from tests.refusals import refused

NOWHERE = "meta"  # a device that is nowhere, on any machine
CURE = "is meta, with which nothing can be computed here .*: set it to cpu, or to a device that this machine has"


@pytest.fixture(autouse=True)
def _nothing_is_read(monkeypatch):
    for module in (text_encoder, family):
        monkeypatch.setattr(module, "load_whole", lambda *_, **__: pytest.fail("weights were read"))


def test_an_encoders_device_is_looked_at_before_its_weights_are_read(models):
    encoder = FluxPolicy(str(models.pipeline), 32, 32).encoder(Encoding(device=NOWHERE))
    with pytest.raises(ValueError, match=f"^data.text_device {CURE}"):
        encoder.text.encode(["a"])
    with pytest.raises(ValueError, match=f"^data.text_device {CURE}"):
        encoder.images().encode(torch.zeros(1, 3, 32, 32))


def test_fit_refuses_a_device_that_is_not_here_before_it_reads_any_weights(models, tmp_path, capsys):
    config = str(tiny.write_config(models, tmp_path / "run", tmp_path / "features"))
    refused(["fit", "--config", config, "--data.text_device", NOWHERE], f"data.text_device {CURE}", capsys)


@pytest.mark.parametrize(
    "job",
    [
        ["cache", "--config"],
        ["export", "--output", "x", "--config"],
        ["control-words", "--images", "x", "--prompts", "x", "--reward", "HPSv2", "--reward.pretrained"],
    ],
    ids=lambda job: job[0],
)
def test_a_job_looks_at_its_device_first(models, tmp_path, capsys, job):
    """With none that is here `cache` waited for no process, for ever."""
    config = str(tiny.write_config(models, tmp_path / "run", tmp_path / "features"))
    argument = str(models.clip) if job[0] == "control-words" else config
    refused([*job, argument, "--device", NOWHERE], f"error: device {CURE}", capsys)


def test_auto_is_a_device_that_is_here():
    assert chosen_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_no_two_processes_share_a_gpu(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("srpo_lightning.jobs.cache.chosen_device", lambda _: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    config = str(tiny.write_config(models, tmp_path / "run", tmp_path / "features"))
    refused(["cache", "--config", config, "--num_processes", "5"], "num_processes is 5, .* GPU of 4: set it", capsys)
