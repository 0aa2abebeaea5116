"""Runs a recipe of configs/ as a user would, with tiny models in the place of the large ones."""

import re
from collections.abc import Sequence
from pathlib import Path

from srpo_lightning.run_folder import RunFolder
from tests import processes, tiny

REPOSITORY = Path(__file__).parents[2]
PROMPTS = "builtin:prompts/photo"


def run_recipe(
    name: str,
    models: tiny.Models,
    folder: Path,
    changes: dict[str, int],
    num_ranks: int = 1,
    beside: Sequence[Path] = (),
) -> Path:
    """`fit` for two steps, with paths, sizes and lengths changed and nothing else; returns the run folder.

    Args:
        changes: further settings by their new values; each must be there.
        beside: configurations that change the recipe, as they are.
    """
    run = folder / "run"
    text = (REPOSITORY / "configs" / f"{name}.yaml").read_text()
    for old, new in {
        "black-forest-labs/FLUX.1-dev": models.pipeline,
        "xswu/HPSv2": models.clip,
        "openai/clip-vit-large-patch14": models.judge,
        f"candidates: [{PROMPTS}_eval.jsonl]": f"candidates: [{models.train}, {models.evaluation}]",
        f"{PROMPTS}_train.jsonl": models.train,
        f"{PROMPTS}_eval.jsonl": models.evaluation,
        f"runs/{name}": run,
    }.items():
        assert old in text, old
        text = text.replace(old, str(new))
    for key, value in {"max_steps": 2, "text_device": "cpu", "height": 32, "width": 32, **changes}.items():
        text, count = re.subn(rf"(?m)^( *{key}: )[^ \n]+", rf"\g<1>{value}", text)
        assert count, key
    config = folder / "flux.yaml"
    config.write_text(text + "\n")
    files = [word for path in (config, *beside) for word in ("--config", str(path))]
    arguments = ["fit", *files, "--data.cache_dir", str(folder / "features"), "--model.num_sample_steps", "2"]
    done = processes.start([*arguments, "--trainer.accelerator", "cpu"], num_ranks)
    assert done.returncode == 0, done.output
    assert [(r["step"], r["weights"]) for r in RunFolder(run).read_metrics()] == [
        (0, "policy"),
        (2, "policy"),
        (2, "ema"),
    ]
    return run
