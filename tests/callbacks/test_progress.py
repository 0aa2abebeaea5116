"""What a run says of the machine that it is on."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from srpo_lightning import phases
from srpo_lightning.callbacks.progress import Progress
from tests import tiny


@pytest.mark.parametrize(
    ("precision", "capability", "is_told"),
    [("bf16-mixed", "AVX2", True), ("bf16-mixed", "AVX512", False), ("32-true", "AVX2", False)],
)
def test_bfloat16_on_a_processor_without_it_is_told(
    models, features, tmp_path, monkeypatch, caplog, precision, capability, is_told
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    caplog.set_level(logging.INFO)
    trainer = tiny.new_trainer(tmp_path, [Progress()], max_steps=1, precision=precision)
    trainer.fit(tiny.new_module(models), tiny.new_data(models, features))
    assert ("set trainer.precision to 32-true" in caplog.text) is is_told


@pytest.mark.parametrize(
    ("evaluation_s", "between", "told"),
    [
        (30.0, 6, ", 0:01:12 for the 6 left, with 2 evaluations of 30 s or more"),
        (0.0, 6, ", 0:00:12 for the 6 left, without evaluations"),
        (30.0, float("inf"), ", 0:00:12 for the 6 left, without evaluations"),
    ],
)
def test_time_left_counts_evaluations_that_were_timed(evaluation_s, between, told):
    progress = Progress()
    progress._evaluation_s = evaluation_s
    trainer = SimpleNamespace(max_steps=10, global_step=4, val_check_batch=between, accumulate_grad_batches=2)
    assert progress._until(trainer, 2.0) == told
    assert progress._until(SimpleNamespace(max_steps=4, global_step=4), 2.0) == ""


def test_a_run_says_how_long_it_will_take_with_its_evaluations(models, features, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    settings = {"max_steps": 8, "val_check_interval": 2, "limit_val_batches": 9, "num_sanity_val_steps": -1}
    trainer = tiny.new_trainer(tmp_path, [Progress()], **settings)
    trainer.fit(tiny.new_module(models), tiny.new_data(models, features))
    assert re.search(r"s per step, 0:00:\d\d for the 5 left, with 2 evaluations of 0 s or more", caplog.text)


def test_a_run_that_breaks_off_leaves_no_listener_that_keeps_its_model(models, features, tmp_path):
    """Lightning has no teardown then."""

    class Breaks(Callback):
        def on_train_batch_start(self, *_):
            raise RuntimeError("out of memory")

    before = list(phases._listeners)
    trainer = tiny.new_trainer(tmp_path, [Progress(), Breaks()], max_steps=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(tiny.new_module(models), tiny.new_data(models, features))
    assert phases._listeners == before
