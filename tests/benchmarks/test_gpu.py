"""The benchmark of a GPU, on tiny models and without one: its parts run, and its tables are what they returned."""

import json
from functools import partial

import pytest
import torch

from benchmarks import gpu, gpu_parts
from srpo_lightning.jobs.estimate.step import BACKWARD, DECODE, ROLLOUT
from tests import processes, tiny


@pytest.fixture
def cpu(models, features, tmp_path, monkeypatch):
    """Tiny models in the place of FLUX.1's, and counters that count."""
    settings = tiny.config(models, tmp_path / "run", features)
    settings["model"]["policy"]["init_args"] |= {"adapter": {"rank": 2}, "dtype": "bfloat16"}
    settings["trainer"]["precision"] = "bf16-mixed"
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))
    monkeypatch.setattr(gpu_parts, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_parts, "CASES", {"LoRA": (str(path), {})})
    readings = iter(range(1, 10_000))
    for name in ("max_memory_allocated", "memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: next(readings) << 20)
    # A CPU without instructions for bfloat16 takes seconds for one product of the usual size.
    monkeypatch.setattr(gpu_parts, "matrix_rate", partial(gpu_parts.matrix_rate, size=64))
    for name in ("reset_peak_memory_stats", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 4 << 30))


def test_peaks_of_the_second_step_are_measured_by_phase_beside_the_predicted_ones(cpu):
    measured, predicted = gpu_parts.memory("LoRA"), gpu_parts.prediction("LoRA")
    assert measured["peaks"].keys() == predicted.keys() >= {ROLLOUT, DECODE, BACKWARD}
    assert all(measured["peaks"][phase] > measured["first step"][phase] for phase in measured["peaks"])
    assert measured["states"] > 0
    assert measured["used"] == 3 << 30
    rows = list(gpu.memory_table(predicted, measured))
    assert len(rows) == 2 + len(predicted)
    assert f"{max(predicted.values()) / max(measured['peaks'].values()):.3f}" in gpu.summary(predicted, measured)


def test_what_does_not_fit_says_how_far_it_came(cpu, monkeypatch):
    class TooLarge:
        accumulates = False

        def __init__(self, *_):
            pass

        def __call__(self, meter):
            meter.phase = ROLLOUT
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")

    monkeypatch.setattr(gpu_parts, "BareStep", TooLarge)
    measured = gpu_parts.memory("LoRA")
    assert measured["out of memory"] == "in: rollout. CUDA out of memory."
    assert "CUDA out of memory." in gpu.summary({ROLLOUT: 1 << 30}, measured)


def test_times_are_those_of_the_parts_and_an_error_is_a_cell(cpu):
    kernels = gpu_parts.kernels("LoRA", ["native", "sage"])
    assert "error" not in kernels["native"], kernels["native"]
    printed = "\n".join(gpu.tables("kernels", kernels))
    assert "attention is 'sage'" in printed
    assert f"| native | {kernels['native']['rollout step']:.4g} |" in printed
    sizes = gpu_parts.checkpointing((32,))
    assert "| 32 px, without |" in "\n".join(gpu.tables("checkpointing", sizes))
    speed = gpu_parts.speed("LoRA", repeats=1)
    assert "| in all |" in "\n".join(gpu.tables("speed", speed))


def test_updates_of_optimizers_are_compared_with_those_of_adamw():
    one = [torch.ones(4), torch.ones(3)]
    assert gpu_parts.distance([2 * t for t in one], one) == pytest.approx(1)
    assert gpu_parts.distance(one, one) == 0


def test_a_part_without_an_end_is_ended_and_one_that_fails_says_why(monkeypatch):
    """Of processes that are forked from one that has imported everything, which takes longer than they do."""
    monkeypatch.setattr(gpu, "CONTEXT", processes.CONTEXT)
    assert gpu.alone("kernels", 0.1) == {"error": "no result within 0 s"}
    assert gpu.alone("nothing", 120)["error"].startswith("AttributeError")


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main()
    assert capsys.readouterr().out == "There is no CUDA GPU here: nothing was measured.\n"
