"""configs/flux_srpo.yaml from its first line to its report, on two ranks, with tiny models for the large ones."""

import os
import subprocess
import sys
from pathlib import Path

from srpo_lightning.callbacks.tracking import read_records
from srpo_lightning.checkpoints import checkpoints

REPOSITORY = Path(__file__).parents[2]


def test_the_flux_configuration_trains_to_its_report_on_models_in_the_same_layout(models, tmp_path):
    """Everything but paths, sizes and lengths is as in the file; accumulation over four micro-batches included."""
    text = (REPOSITORY / "configs" / "flux_srpo.yaml").read_text()
    replacements = {
        "black-forest-labs/FLUX.1-dev": str(models.pipeline),
        "xswu/HPSv2": str(models.clip),
        "openai/clip-vit-large-patch14": str(models.judge),
        "prompts/train.txt": str(models.train),
        "prompts/eval.txt": str(models.evaluation),
        "runs/flux_srpo": str(tmp_path / "run"),
        "height: 720": "height: 32",
        "width: 720": "width: 32",
        "max_steps: 300": "max_steps: 2",
        "val_check_interval: 80": "val_check_interval: 8",
        "text_device: cuda": "text_device: cpu",
        "devices: 8": "devices: 2",
        "shard_size: 8": "shard_size: 2",
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
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000002.ckpt"]
    assert [(r["step"], r["weights"]) for r in read_records(tmp_path / "run")] == [
        (0, "policy"),
        (2, "policy"),
        (2, "ema"),
    ]
