"""A folder of random weights opens as the published model would, and takes little memory to write."""

import json
import shutil

import diffusers
import pytest
import torch
import transformers

from srpo_lightning.cli import main
from srpo_lightning.jobs import stand_in as job
from srpo_lightning.jobs.estimate.published import REWARDS, small_files, write_files
from srpo_lightning.policies.family import families
from srpo_lightning.rewards import HPSv2
from tests import processes
from tests.families.cases import CASES

PUBLISHED = sorted({name for family in families() for name in family.published})
WEIGHTS = {
    "black-forest-labs/FLUX.1-dev": {"transformer": 11.90, "vae": 0.084, "text_encoder": 0.123, "text_encoder_2": 4.76},
    "black-forest-labs/FLUX.2-klein-base-4B": {"transformer": 3.88, "vae": 0.084, "text_encoder": 4.02},
    "black-forest-labs/FLUX.2-klein-base-9B": {"transformer": 9.08, "text_encoder": 8.19 - 151936 * 4096 / 1e9},
    "black-forest-labs/FLUX.2-dev": {"transformer": 32.22},
    "Qwen/Qwen-Image": {"transformer": 20.43, "vae": 0.127, "text_encoder": 8.3},
    "krea/Krea-2-Raw": {"transformer": 12.82, "text_encoder": 4.4},
    "stabilityai/stable-diffusion-3.5-medium": {
        "transformer": 2.24 + 0.23,
        "text_encoder_2": 0.695,
        "text_encoder_3": 4.76,
    },
    "Tongyi-MAI/Z-Image": {"transformer": 6.16, "text_encoder": 4.02},
}
"""Billions, as docs/families.md and the models' cards have them; SD3.5's with its table of positions."""


@pytest.fixture
def published(monkeypatch, tmp_path):
    """Has a small pipeline of a family stand for the published ones."""

    def use(folder):
        files = {
            str(path.relative_to(folder)): json.loads(path.read_text())
            for path in sorted(folder.rglob("*.json"))
            if path.name in ("config.json", "scheduler_config.json") or path.name == "model_index.json"
        }
        for path, content in files.items():
            if path.startswith("text_encoder"):
                content.get("text_config", content)["vocab_size"] = 400  # as many as bytes and letters need
        index = files.pop("model_index.json")
        own = {
            name: value
            for name, value in index.items()
            if not name.startswith("_") and not (isinstance(value, list) and isinstance(value[0], str | None))
        }
        files |= {"model_index.json": own} if own else {}
        for path in folder.glob("tokenizer*/tokenizer_config.json"):
            length = json.loads(path.read_text())["model_max_length"]
            files[str(path.relative_to(folder))] = {"model_max_length": length}
        monkeypatch.setattr(job, "small_files", {"small": files}.get)

    return use


def write(output, *more):
    main(["stand-in", "--model", "small", "--output", str(output), *more])
    return output


@pytest.mark.parametrize("name", CASES)
def test_every_family_opens_as_a_pipeline_and_as_a_policy_whose_numbers_are_finite(published, tmp_path, name):
    case = CASES[name]
    published(case.write(tmp_path / "published"))
    folder = write(tmp_path / "out", "--dtype", "float32")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__ == json.loads((folder / "model_index.json").read_text())["_class_name"]
    reference = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "published")
    for part in ("transformer", "vae"):
        shapes = [{n: t.shape for n, t in getattr(p, part).state_dict().items()} for p in (pipe, reference)]
        assert shapes[0] == shapes[1]
    policy = case.policy(str(folder), 32, 32)
    policy.load()  # refuses missing, unexpected and misshaped tensors
    features = policy.text_encoder(str(folder)).encode(["a red apple"])
    assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in features[0].values())
    again = write(tmp_path / "again", "--dtype", "float32")
    for path in folder.rglob("*.safetensors"):
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_geometries_have_the_published_numbers_of_weights(tmp_path, name):
    """On the meta device: nothing is drawn."""
    write_files(tmp_path, small_files(name))
    found = {component.subfolder: component.num_weights / 1e9 for component in job.pipeline(tmp_path, None)}
    assert {"transformer", "vae", "text_encoder"} <= found.keys()
    for part, billions in WEIGHTS.get(name, {}).items():
        assert found[part] == pytest.approx(billions, rel=0.02), part


def test_fewer_layers_are_those_of_the_largest_text_encoder_and_no_fewer_than_are_read(tmp_path):
    write_files(tmp_path, small_files("black-forest-labs/FLUX.1-dev"))
    found = {component.subfolder: component.model.config for component in job.pipeline(tmp_path, 2)}
    assert (found["text_encoder"].num_hidden_layers, found["text_encoder_2"].num_layers) == (12, 2)
    with pytest.raises(ValueError, match="text_encoder_layers is 26, and features are read from layer 27"):
        job.stand_in("black-forest-labs/FLUX.2-klein-base-4B", str(tmp_path / "new" / "out"), text_encoder_layers=26)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("name", [next(iter(REWARDS))])
def test_a_reward_is_read_like_the_published_one(monkeypatch, tmp_path, name):
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=tower, vision_config=tower | {"image_size": 32, "patch_size": 16})
    files = {"config.json": config.to_dict()}
    monkeypatch.setattr(job, "small_files", lambda _: files)
    main(["stand-in", "--model", name, "--output", str(tmp_path / "out")])
    reward = HPSv2(str(tmp_path / "out"))
    reward.load()
    assert reward(torch.rand(1, 3, 40, 40), ["a cat"]).isfinite().all()


def test_what_cannot_be_written_is_refused_with_the_cure(published, models, tmp_path, monkeypatch):
    def refused(*arguments):
        with pytest.raises(SystemExit) as error:
            main(["stand-in", *arguments])
        return str(error.value)

    assert "choose of xswu/HPSv2" in refused("--model", "mine", "--output", str(tmp_path / "out"))
    (tmp_path / "there").mkdir()
    published(models.pipeline)
    assert "exists already: name another" in refused("--model", "small", "--output", str(tmp_path / "there"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    assert "make room" in refused("--model", "small", "--output", str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_it_never_holds_more_than_a_tensor(tmp_path):
    """Of 64 tensors of 4 MB each; the peak of the process beyond what it had before."""
    done = processes.start([str(tmp_path)], program="tests.jobs.written")
    assert done.returncode == 0, done.output
    before, after, written = json.loads(done.output.splitlines()[-1])
    assert written > 250_000_000
    assert (after - before) * 1024 < 60_000_000
