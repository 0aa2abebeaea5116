"""Two objects have one fingerprint if, and only if, they were made of the same."""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from srpo_lightning.files.fingerprint import Recorded, content_of, described, fingerprint
from srpo_lightning.objectives import SRPO, ControlWords, Plain, Relative
from srpo_lightning.policies import FluxPolicy
from srpo_lightning.policies.adapters import Lora
from srpo_lightning.rewards import SGPHPS, ClipReward, HPSv2, PickScore, Reward, Term, WeightedReward
from tests import tiny


class OfOnesOwn(Reward):
    """A user's, which knows nothing of fingerprints and calls its parent as it likes."""

    def __init__(self, factor: float = 1.0, *, words: tuple = ("a",), table: dict | None = None, dtype=torch.float32):
        super().__init__()
        self.anything = factor

    def forward(self, images, texts):
        return images.mean((1, 2, 3)) * self.anything


class Child(OfOnesOwn):
    """Without a constructor."""


class Longer(OfOnesOwn):
    """Which hands on what it does not know by names of its own."""

    def __init__(self, *before: float, more: int = 0, **settings):
        super().__init__(*before, **settings)


@dataclass
class Settings(Recorded):
    """As a dataclass."""

    a: int = 1
    b: str = "x"


def clip(models: tiny.Models, **settings) -> ClipReward:
    return ClipReward(**{"pretrained": str(models.clip)} | settings)


def policy(models: tiny.Models, **settings) -> FluxPolicy:
    return FluxPolicy(**{"pretrained": str(models.pipeline), "height": 32, "width": 32} | settings)


def weighted(models: tiny.Models, **settings) -> WeightedReward:
    return WeightedReward([Term(**{"reward": clip(models), "weight": 2.0} | settings), Term(OfOnesOwn())])


SAME = {
    "defaults spelled out": lambda models: (
        clip(models),
        clip(models, processor=None, logit_scale_divisor=None, dtype="float32", cache_size=16384),
    ),
    "defaults of a base spelled out": lambda models: (
        SGPHPS(pretrained=str(models.clip)),
        SGPHPS(pretrained=str(models.clip), fit="crop", dtype="float32", as_probability=True),
    ),
    "handed on by place, by name, and not at all": lambda _: (
        Longer(2.0, table=None),
        Longer(factor=2.0, more=0, words=("a",)),
    ),
    "folders of what is made anew": lambda models: (
        policy(models, quantize_dir=str(models.pipeline)),
        policy(models, quantize_dir=None),
    ),
    "another order": lambda _: (OfOnesOwn(factor=2.0, dtype=torch.float16), OfOnesOwn(dtype=torch.float16, factor=2.0)),
    "by place or by name": lambda _: (OfOnesOwn(2.0), OfOnesOwn(factor=2.0)),
    "whole numbers": lambda _: (OfOnesOwn(2), OfOnesOwn(2.0)),
    "dictionaries": lambda _: (OfOnesOwn(table={"a": 1, "b": 2}), OfOnesOwn(table={"b": 2, "a": 1})),
    "terms": lambda models: (weighted(models), weighted(models, mean=0.0, std=1.0, plain=False)),
    "policies": lambda models: (policy(models), policy(models, adapter=None, quantize="none")),
    "forms": lambda _: (Plain(), Plain("{prompt}")),
    "dataclasses": lambda _: (Settings(), Settings(b="x")),
    "copies": lambda models: (weighted(models), copy.deepcopy(weighted(models))),
}

OTHER = {
    "handed on": lambda _: (Longer(2.0), Longer(3.0)),
    "handed on by name": lambda _: (Longer(dtype=torch.float16), Longer()),
    "dtype": lambda models: (clip(models), clip(models, dtype="bfloat16")),
    "dtype of a base": lambda models: (HPSv2(str(models.clip)), HPSv2(str(models.clip), dtype="bfloat16")),
    "logit scale": lambda models: (clip(models), clip(models, logit_scale_divisor=20.0)),
    "processor": lambda models: (clip(models), clip(models, processor=str(models.judge))),
    "weights": lambda models: (clip(models), clip(models, pretrained=str(models.judge))),
    "class": lambda models: (clip(models), PickScore(str(models.clip), None, None)),
    "subclass": lambda _: (OfOnesOwn(), Child()),
    "a subclass's own": lambda _: (Child(), Child(2.0)),
    "fit": lambda models: (HPSv2(str(models.clip)), HPSv2(str(models.clip), fit="pad")),
    "a term's weight": lambda models: (weighted(models), weighted(models, weight=1.0)),
    "a term's mean": lambda models: (weighted(models), weighted(models, mean=1.0)),
    "a term's deviation": lambda models: (weighted(models), weighted(models, std=2.0)),
    "a plain term": lambda models: (weighted(models), weighted(models, plain=True)),
    "a term's reward": lambda models: (weighted(models), weighted(models, reward=clip(models, cache_size=1))),
    "a number in a table": lambda _: (OfOnesOwn(table={"a": 1}), OfOnesOwn(table={"a": 2})),
    "order of words": lambda _: (OfOnesOwn(words=("a", "b")), OfOnesOwn(words=("b", "a"))),
    "a type": lambda _: (OfOnesOwn(), OfOnesOwn(dtype=torch.float64)),
    "a tensor": lambda _: (OfOnesOwn(table={"a": torch.zeros(2)}), OfOnesOwn(table={"a": torch.ones(2)})),
    "template": lambda _: (Plain(), Plain("x. {prompt}")),
    "control words": lambda _: (Relative(ControlWords(["x"], ["y"])), Relative(ControlWords(["x"], ["z"]))),
    "objective": lambda _: (
        SRPO(ControlWords(["x"], ["y"])).form,
        SRPO(ControlWords(["x"], ["y"]), template="{prompt} {word}").form,
    ),
    "size": lambda models: (policy(models), policy(models, height=16)),
    "vae": lambda models: (policy(models), policy(models, vae_dtype="bfloat16")),
    "adapter": lambda models: (policy(models, adapter=Lora(rank=2)), policy(models, adapter=Lora(rank=4))),
    "dataclass": lambda _: (Settings(), Settings(2)),
}


@pytest.mark.parametrize("pair", SAME.values(), ids=SAME)
def test_what_was_made_of_the_same_has_one_fingerprint(models, pair):
    first, second = pair(models)
    assert fingerprint(first) == fingerprint(second)


@pytest.mark.parametrize("pair", OTHER.values(), ids=OTHER)
def test_one_argument_makes_another_fingerprint(models, pair):
    if pair is OTHER["adapter"]:
        pytest.importorskip("peft")
    first, second = pair(models)
    assert fingerprint(first) != fingerprint(second)


def test_a_description_is_json_and_names_no_place_of_this_machine(models):
    text = json.dumps(described([weighted(models), policy(models)]))
    assert str(models.pipeline.parent) not in text
    assert "0x" not in text


def test_what_is_handed_on_to_a_base_is_described_by_the_names_that_a_configuration_has(models):
    assert set(described(SGPHPS(pretrained=str(models.clip)))[1]) == {
        "pretrained", "filename", "processor", "fit", "logit_scale_divisor", "dtype", "cache_size", "as_probability",
    }  # fmt: skip


def test_files_that_an_argument_of_an_argument_names_count(models, tmp_path):
    @dataclass
    class Start:
        pretrained: str
        rank: int = 4

    path = tmp_path / "weights"
    seen = set()
    for content in (b"a", b"b"):
        path.write_bytes(content)
        seen.add(fingerprint(OfOnesOwn(table={"adapter": Start(str(path))})))
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["transformer/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"])
def test_a_folder_is_known_by_its_content_wherever_it_is(models, tmp_path, name):
    own = models._replace(pipeline=shutil.copytree(models.pipeline, tmp_path / "elsewhere"))
    assert fingerprint(policy(own)) == fingerprint(policy(models))
    (own.pipeline / ".DS_Store").write_text("of no account")
    assert fingerprint(policy(own)) == fingerprint(policy(models))
    with (own.pipeline / name).open("ab") as stream:
        stream.write(b" ")
    assert fingerprint(policy(own)) != fingerprint(policy(models))


def test_a_file_is_known_by_its_name_its_size_and_its_ends(tmp_path):
    path = tmp_path / "weights"
    seen = set()
    for content in (b"a" * 3_000_000, b"a" * 3_000_001, b"b" + b"a" * 2_999_999, b"a" * 2_999_999 + b"b"):
        path.write_bytes(content)
        seen.add(content_of(path))
    seen.add(content_of(path.rename(tmp_path / "others")))
    assert len(seen) == 5


def test_a_model_of_the_hub_is_known_by_the_revision_that_is_here(tmp_path, monkeypatch):
    monkeypatch.setattr("srpo_lightning.files.fingerprint.HF_HUB_CACHE", str(tmp_path))

    class Named(OfOnesOwn):
        def __init__(self, pretrained: str):
            super().__init__()

    unknown = fingerprint(Named("someone/model"))
    revision = tmp_path / "models--someone--model" / "refs" / "main"
    revision.parent.mkdir(parents=True)
    seen = {unknown}
    for name in ("0123", "4567"):
        revision.write_text(name)
        seen.add(fingerprint(Named("someone/model")))
    assert len(seen) == 3
    for odd in ("", "x" * 5000, "~nobody_of_this_name/x", "\0", str(Path.cwd() / "nothing here")):
        assert described(Named(odd))[1] == {"pretrained": odd}
