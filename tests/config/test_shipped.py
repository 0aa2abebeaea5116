"""What comes with the package is found by name, from any folder and in an installed wheel."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from srpo_lightning.config.arguments import read_config
from srpo_lightning.config.shipped import (
    ASSETS,
    RECIPES,
    by_name,
    recipe_name,
    recipes,
    with_builtin,
    with_recipes,
)
from tests.processes import LIMIT_S

REPOSITORY = Path(__file__).parents[2]
FEW = {
    "trainer.max_steps": 1,
    "trainer.val_check_interval": 1,
    "model.num_sample_steps": 1,
    "model.objective.init_args.num_rollout_steps": 1,
    "data.batch_size": 1,
    "data.num_eval_prompts": 2,
    "data.eval_samples_per_prompt": 1,
}


def test_a_class_in_a_mapping_of_classes_is_given_what_comes_with_the_package(tmp_path):
    settings = yaml.safe_load((RECIPES / "emoji_demo.yaml").read_text())
    (tracking,) = [own for own in settings["trainer"]["callbacks"] if own["class_path"].endswith("RewardTracking")]
    tracking["init_args"]["metrics"] = {
        "second": {"class_path": "srpo_lightning.rewards.ClipReward", "init_args": {"pretrained": "builtin:emoji-clip"}}
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    read = read_config(str(tmp_path / "run.yaml"))
    (tracking,) = [own for own in read.trainer.callbacks if own.class_path.endswith("RewardTracking")]
    assert tracking.init_args.metrics["second"].init_args.pretrained == str(ASSETS / "emoji-clip")
    assert tracking.init_args.judge.init_args.pretrained == str(ASSETS / "emoji-judge")


def test_recipes_are_named_by_their_files():
    words = ["fit", "--config", "recipe:emoji_demo", "--config=recipe:forms/other_prompts", "--data.train", "recipe:x"]
    assert with_recipes(words) == [
        "fit",
        "--config",
        str(RECIPES / "emoji_demo.yaml"),
        f"--config={RECIPES / 'forms' / 'other_prompts.yaml'}",
        "--data.train",
        "recipe:x",
    ]
    assert {"emoji_demo", "families/z_image", "forms/host_offload"} <= set(recipes())


def test_files_of_recipes_have_their_names_and_others_their_paths():
    assert recipe_name(str(RECIPES / "families" / "z_image.yaml")) == "recipe:families/z_image"
    assert recipe_name("configs/emoji_demo.yaml") == "configs/emoji_demo.yaml"


def test_a_recipe_that_there_is_not_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"^recipe:flux_srpo_qlroa: there is no such recipe; did you mean recipe:flux_"
    ):
        with_recipes(["fit", "--config", "recipe:flux_srpo_qlroa"])
    with pytest.raises(ValueError, match=r"^recipe:..: there is no such recipe; there are recipe:emoji_demo, "):
        with_recipes(["fit", "--config", "recipe:.."])


@pytest.mark.parametrize("name", ["emoji-flux", "moving-wan", "prompts/eval.txt"])
def test_the_nearest_of_what_is_shipped_is_named(name):
    with pytest.raises(ValueError, match=f"did you mean builtin:{name}"):
        with_builtin(f"builtin:{name[:-1]}")


def test_names_of_what_is_shipped_become_paths_wherever_they_stand():
    settings = {"a": ["builtin:emoji-flux", {"b": "builtin:prompts/eval.txt"}], "c": ("builtin", 3, None)}
    named = with_builtin(settings)
    assert by_name(named) == settings
    assert by_name([f"{ASSETS}-mine/a", 3, "a/b"]) == [f"{ASSETS}-mine/a", 3, "a/b"]
    assert named == {
        "a": [str(ASSETS / "emoji-flux"), {"b": str(ASSETS / "prompts" / "eval.txt")}],
        "c": ("builtin", 3, None),
    }
    with pytest.raises(ValueError, match=r"^builtin:emoji-flx: nothing .*; did you mean builtin:emoji-flux\?$"):
        with_builtin(["builtin:emoji-flx"])


@pytest.mark.parametrize("recipe", recipes())
def test_recipes_name_nothing_by_its_place_in_the_checkout(recipe):
    def texts(value: object) -> list[str]:
        if isinstance(value, dict):
            return [text for own in value.values() for text in texts(own)]
        return [text for own in value for text in texts(own)] if isinstance(value, list) else [str(value)]

    found = texts(yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()))
    with_builtin(found)
    assert not [text for text in found if "assets/" in text]


def test_the_demo_runs_from_an_installed_wheel_in_an_empty_folder(tmp_path):
    """A class of the user's own, in that folder, is found as well."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(REPOSITORY),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S)
    (wheel,) = tmp_path.glob("*.whl")
    site, folder = tmp_path / "site", tmp_path / "folder"
    zipfile.ZipFile(wheel).extractall(site)
    folder.mkdir()
    (folder / "mine.py").write_text("from srpo_lightning.objectives import DirectAlign\nclass Mine(DirectAlign): ...\n")
    settings = [word for name, value in FEW.items() for word in (f"--{name}", str(value))]
    program = [sys.executable, "-m", "srpo_lightning", "fit", "--config", "recipe:emoji_demo"]
    done = subprocess.run(
        [*program, "--model.objective", "mine.Mine", *settings],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "runs" / "emoji_demo"
    assert (run / "report.html").is_file()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["policy"]["init_args"]["pretrained"] == "builtin:emoji-flux"
    assert config["model"]["objective"]["class_path"] == "mine.Mine"
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["files"] == ["recipe:emoji_demo"]
    moved = folder.rename(tmp_path / "another_machine") / "runs" / "emoji_demo"
    records = [path for path in moved.rglob("*") if path.suffix in (".yaml", ".json", ".jsonl", ".html", ".md")]
    assert len(records) > 4
    assert not [path for path in records if str(site) in path.read_text()]
