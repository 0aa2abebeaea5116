"""The benchmark of a training step, on tiny models: what it prints is what was measured."""

import json
import re
import warnings

import pytest
import torch

from benchmarks import step
from benchmarks.bare_step import BareStep, load
from benchmarks.meter import PHASES, Meter, model_flops
from srpo_lightning.config.arguments import read_config
from srpo_lightning.jobs.estimate.options import POLICY
from srpo_lightning.jobs.estimate.prediction import fake_conditions
from srpo_lightning.phases import BACKWARD, DECODE, FORWARD, REWARD, ROLLOUT
from tests import tiny


@pytest.fixture
def path(models, features, tmp_path):
    settings = tiny.config(models, tmp_path / "run", features)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(settings))
    return str(file)


def test_one_repeat_prints_every_phase_and_what_lightning_adds(path, monkeypatch, capsys):
    monkeypatch.setitem(step.CONFIGS, "small", path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step.main(repeats=1, compile=False, steps=2)
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^\| ([\w ]+?) \| ([\d.]+) \|", printed, re.MULTILINE))
    assert list(rows) == [*PHASES, "in all"]
    assert sum(float(rows[phase]) for phase in PHASES) == pytest.approx(float(rows["in all"]), abs=1e-3)
    assert re.search(r"a step through Lightning over a bare one: [\d.]+ \(", printed)


def test_full_geometry_without_a_gpu_says_so_and_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    step.main("flux")
    assert capsys.readouterr().out == "There is no CUDA GPU here: nothing was measured at the size of FLUX.1-dev.\n"


def test_full_geometry_is_built_at_random_where_its_files_are_not(path):
    """The code that a GPU runs, on tiny models."""
    config = read_config(path)
    module = load(config, torch.device("cpu"), "flux")
    weights = torch.cat([p.flatten() for p in module.parameters()])
    assert weights.isfinite().all()
    assert module.policy.transformer.x_embedder.weight.std() > 0
    batch = fake_conditions(config, module.policy, config.data.batch_size)
    BareStep(module, config, batch, module.configure_optimizers())()


def test_model_flops_are_twice_the_multiplications_and_do_not_count_recomputation(path):
    """Two rollout steps of batch 2 are a trained step of batch 4, whose backward pass takes twice as much again.

    The backward pass lacks the gradient with respect to the first layers' inputs.
    """
    config = read_config(path)
    flops = model_flops(config)
    assert flops[ROLLOUT] == flops[FORWARD] > 0
    assert 1.8 < flops[BACKWARD] / flops[FORWARD] <= 2
    assert flops[DECODE] > 0
    assert flops[REWARD] > 0
    config[f"{POLICY}.gradient_checkpointing"] = config[f"{POLICY}.vae_checkpointing"] = True
    assert model_flops(config) == flops


def test_a_meter_adds_up_what_each_phase_takes():
    readings = iter([0.0, 1.0, 3.0, 7.0])
    meter = Meter(lambda: next(readings), lambda start, end: end - start)
    for phase in ("a", "b", "a"):
        meter.phase = phase
    assert meter.take() == {"a": 5.0, "b": 2.0}
