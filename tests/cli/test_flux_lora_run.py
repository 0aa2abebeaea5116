"""The recipes for adapters from first line to exported adapter, with tiny models for the large ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from srpo_lightning.callbacks.lora import lora_path
from srpo_lightning.callbacks.tracking import read_records
from srpo_lightning.checkpoints import checkpoint_path

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "package"), [("flux_srpo_lora", "peft"), ("flux_srpo_qlora", "bitsandbytes")])
def test_the_configurations_of_adapters_train_to_their_files_on_models_in_the_same_layout(
    models, tmp_path, name, package
):
    """Everything but paths, sizes and lengths is as in the file."""
    pytest.importorskip("peft")
    pytest.importorskip(package)
    text = (REPOSITORY / "configs" / f"{name}.yaml").read_text()
    px = 512 if name == "flux_srpo_qlora" else 720
    replacements = {
        "black-forest-labs/FLUX.1-dev": str(models.pipeline),
        "xswu/HPSv2": str(models.clip),
        "openai/clip-vit-large-patch14": str(models.judge),
        "prompts/train.txt": str(models.train),
        "prompts/eval.txt": str(models.evaluation),
        f"default_root_dir: runs/{name}": f"default_root_dir: {tmp_path / 'run'}",
        f"height: {px}": "height: 32",
        f"width: {px}": "width: 32",
        "max_steps: 300": "max_steps: 2",
        "accumulate_grad_batches: 32": "accumulate_grad_batches: 2",
        "val_check_interval: 640": "val_check_interval: 4",
        "text_device: cuda": "text_device: cpu",
    }
    for old, new in replacements.items():
        assert old in text, old
        text = text.replace(old, new)
    config = tmp_path / "flux.yaml"
    config.write_text(text + "\n")
    command = [sys.executable, "-m", "srpo_lightning", "fit", "--config", str(config)]
    command += ["--data.cache_dir", str(tmp_path / "features"), "--trainer.accelerator", "cpu"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    saved = torch.load(checkpoint_path(tmp_path / "run", 2), weights_only=True)
    assert saved["state_dict"]
    assert all(".lora_" in parameter for parameter in saved["state_dict"])
    files = sorted(
        path.relative_to(lora_path(tmp_path / "run", 2)) for path in lora_path(tmp_path / "run", 2).rglob("*.*")
    )
    assert [str(file) for file in files] == ["ema/pytorch_lora_weights.safetensors", "pytorch_lora_weights.safetensors"]
    assert [(r["step"], r["weights"]) for r in read_records(tmp_path / "run")] == [
        (0, "policy"),
        (2, "policy"),
        (2, "ema"),
    ]
