"""Names and order of rows against diffusers' converter of single files, which goes the other way."""

import pytest
import torch
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_chroma_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
)

from srpo_lightning.policies import ChromaPolicy, FluxPolicy

NAMES = FluxPolicy.single_file


def state_dict(cls=FluxTransformer2DModel, **settings) -> dict[str, torch.Tensor]:
    """FLUX.1's width, without which the converters do not work, with two blocks of each kind and two columns."""
    with torch.device("meta"):
        outline = cls(num_layers=2, num_single_layers=2, **settings)
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape[0], *[2] * (p.ndim - 1), generator=draw) for name, p in outline.named_parameters()
    }


def to_theirs(state, names=NAMES):
    return {name: names.joined(name, [state[own] for own in parts]) for name, parts in names.sources(state).items()}


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_diffusers_own_converter_turns_the_names_back_bit_for_bit(guidance_embeds):
    state = state_dict(guidance_embeds=guidance_embeds)
    theirs = to_theirs(state)
    assert any("guidance_in" in name for name in theirs) == guidance_embeds
    back = convert_flux_transformer_checkpoint_to_diffusers(dict(theirs))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_chromas_converter_does_likewise():
    state = state_dict(ChromaTransformer2DModel)
    back = convert_chroma_transformer_checkpoint_to_diffusers(to_theirs(state, ChromaPolicy.single_file))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_what_was_joined_is_divided_again():
    state = state_dict(guidance_embeds=True)
    back = {}
    for name, parts in NAMES.sources(state).items():
        joined = NAMES.joined(name, [state[own] for own in parts])
        back |= dict(zip(parts, NAMES.divided(name, joined, [len(state[own]) for own in parts]), strict=True))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_shapes_are_those_of_the_published_file():
    """Of flux1-dev.safetensors: 780 tensors, these among them."""
    with torch.device("meta"):
        published = FluxTransformer2DModel(guidance_embeds=True).state_dict()
    shapes = {}
    for name, parts in NAMES.sources(published).items():
        first = published[parts[0]].shape
        shapes[name] = (sum(published[own].shape[0] for own in parts), *first[1:])
    assert len(shapes) == 780
    assert shapes["double_blocks.18.img_attn.qkv.weight"] == (9216, 3072)
    assert shapes["double_blocks.0.txt_attn.norm.key_norm.scale"] == (128,)
    assert shapes["single_blocks.37.linear1.weight"] == (21504, 3072)
    assert shapes["final_layer.adaLN_modulation.1.bias"] == (6144,)


def test_a_parameter_without_a_place_is_refused():
    with pytest.raises(ValueError, match=r"no place for 1 .*, first extra.weight: export it with --format diffusers"):
        NAMES.sources([*state_dict(guidance_embeds=False), "extra.weight"])
