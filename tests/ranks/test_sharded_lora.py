"""Adapters on two gloo ranks: divided by FSDP2, or whole beside a base in 4 bits under DDP."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from srpo_lightning.cli import main
from srpo_lightning.run_folder import RunFolder
from tests.ranks.test_sharded import assert_close, config, fit, whole

ROOT = Path(__file__).parents[2]

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


def test_one_rank_whose_weights_stay_in_host_memory_trains_what_a_device_trains(models, features, tmp_path):
    """Frozen ones and adapters alike, as configs/forms/host_offload.yaml has it; resumed as well."""
    offload = yaml.safe_load((ROOT / "configs" / "forms" / "host_offload.yaml").read_text())["trainer"]
    paths = {
        name: config(models, features, tmp_path / name, 1, **trainer)
        for name, trainer in (("device", {}), ("host", offload))
    }
    for path in paths.values():
        settings = json.loads(path.read_text())
        settings["model"]["policy"]["init_args"] |= {"adapter": {"rank": 4}, "dtype": "bfloat16"}
        settings["trainer"]["precision"] = "bf16-mixed"
        path.write_text(json.dumps(settings))
    fit(paths["device"])
    fit(paths["host"], "--trainer.max_steps", "2")
    fit(paths["host"], "--ckpt_path", "last")
    assert_close(whole(tmp_path / "host", 4), whole(tmp_path / "device", 4))


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
