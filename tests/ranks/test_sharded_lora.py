"""Adapters on two gloo ranks: divided by FSDP2, or whole beside a base in 4 bits under DDP."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srpo_lightning.cli import main
from srpo_lightning.run_folder import RunFolder
from tests.ranks.test_sharded import assert_close, config, fit, whole

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(
    ("policy", "trainer"),
    [
        ({"adapter": {"rank": 4, "dora": True}}, {}),  # A, B and the lengths of rows
        ({"adapter": {"rank": 4}, "quantize": "nf4", "quantize_dir": None}, {"strategy": "ddp"}),
    ],
    ids=["sharded", "4 bits"],
)
def test_two_ranks_train_and_export_the_adapter_of_one_process(models, features, tmp_path, policy, trainer):
    def write(name: str, ranks: int, **trainer) -> Path:
        path = config(models, features, tmp_path / name, ranks, **trainer)
        settings = json.loads(path.read_text())
        settings["model"]["policy"]["init_args"] |= policy
        settings["trainer"]["callbacks"].append({"class_path": "srpo_lightning.callbacks.LoraExport"})
        path.write_text(json.dumps(settings))
        return path

    main(["fit", "--config", str(write("one", 1))])
    fit(write("two", 2, **trainer))
    one, two = whole(tmp_path / "one", 4), whole(tmp_path / "two", 4)
    assert_close(two, one)
    assert all(".lora_" in name for name in one["state_dict"])
    for place in ("", "ema"):
        file = Path(place) / "pytorch_lora_weights.safetensors"
        ours, theirs = (load_file(RunFolder(tmp_path / run).lora(4) / file) for run in ("two", "one"))
        assert len(ours) == len(one["state_dict"])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
