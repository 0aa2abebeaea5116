"""configs/families: a second configuration that puts another model into a recipe of FLUX.1."""

from functools import cache
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace

from srpo_lightning import flow
from srpo_lightning.config.arguments import new_module, read_config
from srpo_lightning.jobs.estimate.published import local_files
from srpo_lightning.run_folder import RunFolder
from tests.cli.recipes import run_recipe
from tests.families import tiny_z_image

FAMILIES = sorted(Path("configs/families").glob("*.yaml"))
RECIPES = ["flux_srpo", "flux_srpo_lora", "flux_srpo_qlora"]


@cache
def recipe_alone(name: str) -> Namespace:
    return read_config(f"configs/{name}.yaml")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda path: path.stem)
def test_a_familys_file_goes_with_every_recipe(family):
    for recipe in RECIPES:
        settings = read_config(f"configs/{recipe}.yaml", str(family))
        alone = recipe_alone(recipe)
        with local_files(settings):
            policy = new_module(settings).policy
            cell = policy.cell
            assert policy.has_negative == (settings.model.objective.init_args.rollout_guidance != 1)
        assert type(policy).__name__ == settings.model.policy.class_path.rpartition(".")[2]
        sizes = set() if 720 % cell == 0 else {"height", "width"}  # 720 is the size of most recipes
        kept = vars(alone.model.policy.init_args).keys() - {"pretrained"} - sizes
        for name in kept:
            assert settings.model.policy.init_args[name] == alone.model.policy.init_args[name], "what is trained stays"
        assert settings.model.sample_guidance != 1


def test_the_official_run_of_qwen_image_is_read():
    files = ("configs/flux_srpo.yaml", "configs/families/qwen_image.yaml", "configs/forms/official_qwen_image.yaml")
    settings = read_config(*files)
    with local_files(settings):
        objective = new_module(settings).objective
    levels = flow.schedule(objective.num_schedule_steps, objective.shift)[list(objective.window)]
    assert levels.tolist() == pytest.approx([0.9, 0.2])
    assert not objective.inversion
    assert objective.shift == 1


def test_a_recipe_with_a_familys_file_trains_its_model(tmp_path, models):
    """The LoRA recipe for two steps, line by line, with Z-Image's small model."""
    pipeline = tiny_z_image.write(tmp_path / "z_image")
    family = tmp_path / "family.yaml"
    text = Path("configs/families/z_image.yaml").read_text()
    text = text.replace("Tongyi-MAI/Z-Image ", f"{pipeline} ").replace("runs/z_image", str(tmp_path / "run"))
    family.write_text(text.replace("num_sample_steps: 50", "num_sample_steps: 2"))
    changes = {"accumulate_grad_batches": 2, "val_check_interval": 4, "every_n_steps": 2}
    run = run_recipe("flux_srpo_lora", models, tmp_path, changes, beside=[family])
    saved = torch.load(RunFolder(run).checkpoint(2), weights_only=True)
    assert all(".lora_" in name for name in saved["state_dict"])
    assert any("noise_refiner.0." in name for name in saved["state_dict"])
