"""Runs a recipe of configs/ as a user would, with tiny models in the place of the large ones."""

from pathlib import Path

from srpo_lightning.callbacks.tracking import read_records
from tests import processes, tiny

REPOSITORY = Path(__file__).parents[2]


def run_recipe(name: str, models: tiny.Models, folder: Path, changes: dict[str, str], num_ranks: int = 1) -> Path:
    """`fit` for two steps, with paths, sizes and lengths changed and no other line; returns the run folder.

    Args:
        changes: further pieces of the file's text by what they become; each must be there.
    """
    run = folder / "run"
    text = (REPOSITORY / "configs" / f"{name}.yaml").read_text()
    replacements = {
        "black-forest-labs/FLUX.1-dev": str(models.pipeline),
        "xswu/HPSv2": str(models.clip),
        "openai/clip-vit-large-patch14": str(models.judge),
        "prompts/train.txt": str(models.train),
        "prompts/eval.txt": str(models.evaluation),
        f"default_root_dir: runs/{name}": f"default_root_dir: {run}",
        "max_steps: 300": "max_steps: 2",
        "text_device: cuda": "text_device: cpu",
        **changes,
    }
    for old, new in replacements.items():
        assert old in text, old
        text = text.replace(old, new)
    config = folder / "flux.yaml"
    config.write_text(text + "\n")
    arguments = ["fit", "--config", str(config), "--data.cache_dir", str(folder / "features")]
    done = processes.start([*arguments, "--trainer.accelerator", "cpu"], num_ranks)
    assert done.returncode == 0, done.output
    assert [(r["step"], r["weights"]) for r in read_records(run)] == [(0, "policy"), (2, "policy"), (2, "ema")]
    return run
