"""`python -m tools.moving`: `build` the models of the moving world, `evaluate` them."""

from pathlib import Path

import torch
from jsonargparse import auto_cli

import srpo_lightning
from tools.emoji.world import build_world

from .build import Build, Steps
from .evaluate import evaluate_assets

WORK = Path(".work/moving")
ASSETS = Path(srpo_lightning.__file__).parent / "assets"


def build(work: Path = WORK, assets: Path = ASSETS, steps: Steps = Steps(), threads: int = 2) -> None:  # noqa: B008
    """Make the models of the moving world from nothing, or go on where an earlier call was stopped.

    Args:
        work: folder for pictures, checkpoints and logs.
        assets: folder that gets the finished models.
        steps: length of each stage.
        threads: CPU threads to train with.
    """
    torch.set_num_threads(threads)
    Build(work, assets, steps).everything()


def evaluate(work: Path = WORK, assets: Path = ASSETS) -> None:
    """Print the table of quality of the finished models, and write moving sheets into the work folder.

    Args:
        work: folder for the pictures and the sheets.
        assets: folder of the finished models.
    """
    print(evaluate_assets(assets, build_world(work / "icons", work / "world.npz"), work / "sheets"))


if __name__ == "__main__":
    auto_cli([build, evaluate])
