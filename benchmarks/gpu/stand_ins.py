"""Stand-ins of published models on the disk, for what is to be read from files as a run reads them."""

import json
from pathlib import Path

import torch

from benchmarks.gpu.recipes import ASSETS
from benchmarks.gpu.scale import Scale
from srpo_lightning.files.checkpoints import complete_or_absent_folder
from srpo_lightning.jobs.estimate.published import small_files, write_files
from srpo_lightning.jobs.stand_in import pipeline, write_weights

FLUX = "black-forest-labs/FLUX.1-dev"


def flux_stand_in(scale: Scale, blocks: int | None = None) -> str:
    """FLUX.1-dev's transformer and VAE with random weights, without text encoders; written where it is not there yet.

    Args:
        scale: At `small` the built-in model is taken as it is.
        blocks: Number of blocks of each of the two kinds; None: all 19 and 38.

    Returns:
        The folder.
    """
    if scale.is_small:
        return f"{ASSETS}/emoji-flux"
    folder = Path(scale.folder) / f"flux-{blocks or 'all'}"
    if not folder.is_dir():
        files = small_files(FLUX)
        assert files is not None
        folder.parent.mkdir(parents=True, exist_ok=True)
        with complete_or_absent_folder(folder) as partial:
            write_files(partial, files)
            if blocks is not None:
                keep_blocks(partial / "transformer" / "config.json", blocks)
            for component in pipeline(partial, 1):
                if component.subfolder in ("transformer", "vae"):
                    write_weights(partial, component, torch.bfloat16, 0)
    return str(folder)


def keep_blocks(path: Path, blocks: int) -> None:
    """Have a transformer's configuration say so many blocks of each kind."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {"num_layers": blocks, "num_single_layers": blocks}
    path.write_text(json.dumps(content), encoding="utf-8")
