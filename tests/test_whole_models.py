"""A model folder that lacks a tensor, has one too many or one of another shape is refused, whatever reads it."""

import re
import shutil
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from srpo_lightning.policies import FluxPolicy
from srpo_lightning.policies.flux import FluxTextEncoder
from srpo_lightning.rewards import HPSv2
from tests import tiny
from tools.emoji.evaluate import Critic


@pytest.fixture
def own(models, tmp_path) -> tiny.Models:
    """A copy of the models, to damage."""
    clip = shutil.copytree(models.clip, tmp_path / "clip")
    return models._replace(pipeline=shutil.copytree(models.pipeline, tmp_path / "flux"), clip=clip)


def load_policy(models: tiny.Models) -> None:
    tiny.new_policy(models)


def divide_policy(models: tiny.Models) -> None:
    FluxPolicy(str(models.pipeline), 32, 32).load(lambda model, _: model.to_empty(device="cpu"))


READERS: dict[str, tuple[str, str, Callable[[tiny.Models], object]]] = {
    "transformer": ("flux/transformer", "x_embedder.weight", load_policy),
    "transformer, divided": ("flux/transformer", "x_embedder.weight", divide_policy),
    "vae": ("flux/vae", "decoder.conv_in.weight", load_policy),
    "vae's encoder": (
        "flux/vae",
        "encoder.conv_in.weight",
        lambda models: tiny.image_encoder(models.pipeline).encode(torch.zeros(1, 3, 16, 16)),
    ),
    "text encoder": (
        "flux/text_encoder",
        "encoder.layers.0.self_attn.q_proj.weight",
        lambda models: FluxTextEncoder(str(models.pipeline)).encode(["a"]),
    ),
    "T5": (
        "flux/text_encoder_2",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        lambda models: FluxTextEncoder(str(models.pipeline)).encode(["a"]),
    ),
    "CLIP reward": (
        "clip",
        "vision_model.encoder.layers.0.self_attn.q_proj.weight",
        lambda models: tiny.new_reward(models.clip),
    ),
    "converted HPSv2": ("clip", "text_projection.weight", lambda models: HPSv2(str(models.clip)).load()),
    "emoji critic": ("clip", "visual_projection.weight", lambda models: Critic(models.clip, ["a"])),
}

DAMAGES = {
    "missing": lambda tensors, name: tensors.pop(name),
    "unexpected": lambda tensors, name: tensors.update(odd=torch.zeros(1)),
    "missing, renamed": lambda tensors, name: tensors.update(odd=tensors.pop(name)),
    "of another shape": lambda tensors, name: tensors.update({name: torch.zeros(1, *tensors[name].shape)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reader", READERS)
def test_a_tensor_is_refused_by_folder_and_name(own, tmp_path, reader, damage):
    folder, name, read = READERS[reader]
    (path,) = (tmp_path / folder).glob("*.safetensors")
    tensors = load_file(path)
    (found,) = (key for key in tensors if key.endswith(name))
    DAMAGES[damage](tensors, found)
    save_file(tensors, path, {"format": "pt"})
    named = "odd" if damage == "unexpected" else name
    expected = rf"^{tmp_path / folder}[^\n]* {re.escape(named)}[^\n]*copy or download the folder again$"
    with pytest.raises(ValueError, match=expected):
        read(own)


def test_a_text_encoder_that_is_part_of_a_whole_clip_is_read(own):
    """Fine-tuned ones are published so; FLUX reads its text model alone."""
    (path,) = (own.pipeline / "text_encoder").glob("*.safetensors")
    before = FluxTextEncoder(str(own.pipeline)).encode(["a"])[0]["pooled_prompt_embeds"]
    save_file(load_file(path) | {"text_projection.weight": torch.zeros(16, 16)}, path, {"format": "pt"})
    assert torch.equal(FluxTextEncoder(str(own.pipeline)).encode(["a"])[0]["pooled_prompt_embeds"], before)


def test_no_features_of_a_model_that_lacks_a_tensor_are_cached(own, tmp_path):
    (path,) = (own.pipeline / "text_encoder_2").glob("*.safetensors")
    tensors = load_file(path)
    del tensors["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(tensors, path, {"format": "pt"})
    data = tiny.new_data(own, tmp_path / "features")
    with pytest.raises(ValueError, match=r"text_encoder_2 holds other weights .*1 missing, first encoder\.block\.0"):
        data.prepare_data()
    assert not data.cache.open().files
