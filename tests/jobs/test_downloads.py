"""What a recipe needs is listed in one place, with what is here of it."""

import json

import pytest

from srpo_lightning.cli import main
from srpo_lightning.jobs import downloads as job
from srpo_lightning.jobs.estimate.published import LICENCES
from srpo_lightning.policies.family import families
from tests import tiny


def listed(capsys, *configs):
    main(["downloads", *(part for config in configs for part in ("--config", str(config)))])
    lines = capsys.readouterr().out.splitlines()
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}


def test_a_recipe_names_every_model_with_size_and_licence(capsys, monkeypatch):
    monkeypatch.setattr(job, "bytes_in_cache", lambda: {"openai/clip-vit-large-patch14": 1_700_000_000})
    rows = listed(capsys, "configs/flux_srpo_qlora.yaml")
    policy, hps, tokenizer, judge = (
        rows[name]
        for name in (
            "black-forest-labs/FLUX.1-dev",
            "xswu/HPSv2",
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            "openai/clip-vit-large-patch14",
        )
    )
    assert policy[0] == "model.policy.pretrained"
    assert float(policy[1]) == pytest.approx(23.8 + 0.17 + 0.25 + 9.5, abs=0.1)
    assert policy[2].startswith("non-commercial")
    assert policy[3].startswith("no: ")
    assert float(hps[1]) == pytest.approx(1.97, abs=0.05)
    assert tokenizer[:3] == ["model.reward.processor", "0.0, no weights", "see its page"]
    assert judge[0] == "trainer.callbacks.RewardTracking.judge.pretrained"
    assert judge[3] == "1.7 GB in the hub cache"


def test_heads_weights_and_tokenizers_of_rewards_are_listed_too(capsys, models, features, tmp_path):
    path = tiny.write_config(models, tmp_path / "run", features)
    settings = json.loads(path.read_text())
    tracking = next(own for own in settings["trainer"]["callbacks"] if own["class_path"].endswith("RewardTracking"))
    heads = {"head": "someone/head"}
    tracking["init_args"]["metrics"] = {
        name.lower(): {"class_path": f"srpo_lightning.rewards.{name}", "init_args": own}
        for name, own in (("HPSv3", {}), ("ImageReward", {}), ("LaionAesthetic", heads))
    }
    settings["trainer"]["callbacks"].append(
        {"class_path": "srpo_lightning.callbacks.OverOptimizationGuard", "init_args": {"weights": "ema"}}
    )
    path.write_text(json.dumps(settings))
    rows = listed(capsys, path)
    for name, setting in (
        ("MizzenAI/HPSv3", "hpsv3.weights"),
        ("bert-base-uncased", "imagereward.tokenizer"),
        ("someone/head", "laionaesthetic.head"),
    ):
        assert rows[name][0] == f"trainer.callbacks.RewardTracking.metrics.{setting}"
        assert rows[name][3].startswith("no: "), name
    assert not {"ema", "policy"} & rows.keys()


@pytest.mark.parametrize("name", ["HPSv2", "SGPHPS"])
def test_the_tokenizer_that_hpsv2_takes_from_the_hub_is_listed_unless_it_is_named_or_converted(name, capsys, tmp_path):
    path, converted = tmp_path / "reward.json", tmp_path / "converted"
    converted.mkdir()
    (converted / "config.json").touch()
    found = []
    for own in ({}, {"pretrained": str(converted)}, {"processor": "someone/tokenizer"}):
        reward = {"class_path": f"srpo_lightning.rewards.{name}", "init_args": own}
        path.write_text(json.dumps({"model": {"reward": reward}}))
        rows = listed(capsys, "configs/flux_srpo_qlora.yaml", path)
        found.append([model for model, row in rows.items() if "model.reward.processor" in row[0]])
    assert found == [["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"], [], ["someone/tokenizer"]]


def test_a_reward_of_two_models_names_both_and_whose_weights_are_meant_is_no_model(capsys, tmp_path):
    path = tmp_path / "reward.json"
    reward = {
        "class_path": "srpo_lightning.rewards.VideoAlignReward",
        "init_args": {"pretrained": "Qwen/Qwen2-VL-2B-Instruct"},  # else it would be the recipe's reward's
    }
    path.write_text(json.dumps({"model": {"reward": reward}}))
    rows = listed(capsys, "configs/flux_srpo_qlora.yaml", path)
    assert rows["KwaiVGI/VideoReward"][::2] == ["model.reward.weights", "Apache-2.0"]
    assert rows["Qwen/Qwen2-VL-2B-Instruct"][::2] == ["model.reward.pretrained", "Apache-2.0"]
    assert not list(job.named("", {"callback": {"weights": "ema"}}))


def test_folders_of_this_machine_are_there_or_not(capsys, models, features, tmp_path):
    path = tiny.write_config(models, tmp_path / "run", features)
    rows = listed(capsys, path)
    assert rows[str(models.pipeline)][3] == "yes"
    path.write_text(path.read_text().replace(str(models.clip), "/nowhere/at/all"))
    assert listed(capsys, path)["/nowhere/at/all"][3] == "no such path"


def test_every_published_model_has_its_licence():
    assert {name for family in families() for name in family.published} <= LICENCES.keys()
