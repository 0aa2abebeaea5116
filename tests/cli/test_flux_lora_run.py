"""The recipes for adapters from first line to exported adapter, with tiny models for the large ones."""

import pytest
import torch

from srpo_lightning.run_folder import RunFolder
from tests.cli.recipes import run_recipe


@pytest.mark.parametrize(("name", "package"), [("flux_srpo_lora", "peft"), ("flux_srpo_qlora", "bitsandbytes")])
def test_the_configurations_of_adapters_train_to_their_files_on_models_in_the_same_layout(
    models, tmp_path, name, package
):
    """Everything but paths, sizes and lengths is as in the file."""
    pytest.importorskip("peft")
    pytest.importorskip(package)
    changes = {"accumulate_grad_batches": 2, "val_check_interval": 4, "every_n_steps": 2}
    run = run_recipe(name, models, tmp_path, changes)
    saved = torch.load(RunFolder(run).checkpoint(2), weights_only=True)
    assert saved["state_dict"]
    assert all(".lora_" in parameter for parameter in saved["state_dict"])
    files = sorted(path.relative_to(RunFolder(run).lora(2)) for path in RunFolder(run).lora(2).rglob("*.*"))
    assert [str(file) for file in files] == ["ema/pytorch_lora_weights.safetensors", "pytorch_lora_weights.safetensors"]
