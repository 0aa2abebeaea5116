"""The recipes that train all weights, to their report, on two ranks, with tiny models for the large ones."""

import pytest

from srpo_lightning.run_folder import RunFolder
from tests.cli.recipes import run_recipe


@pytest.mark.parametrize("name", ["flux_srpo", "flux_refl", "flux_draft", "flux_grpo"])
def test_a_flux_configuration_trains_to_its_report_on_models_in_the_same_layout(models, tmp_path, name):
    """Everything but paths, sizes and lengths is as in the file; accumulation over four micro-batches included."""
    changes = {"val_check_interval": 8, "devices": 2, "shard_size": 2}
    if name == "flux_grpo":
        changes |= {"val_check_interval": 2, "num_nodes": 1, "replicate_size": 1}
    run = run_recipe(name, models, tmp_path, changes, num_ranks=2)
    assert [path.name for path in RunFolder(run).checkpoints()] == ["step-00000002.ckpt"]
