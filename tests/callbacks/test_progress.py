"""What a run says of the machine that it is on."""

import logging

import pytest
import torch

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
