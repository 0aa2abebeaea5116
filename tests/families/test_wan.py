"""What Wan alone has: two samplers, a text that is cleaned, a finer VAE in the model of 5 B."""

import diffusers
import pytest
import torch

from srpo_lightning.batch import Conditions, Text
from srpo_lightning.draws import sample_noise
from srpo_lightning.encoding import Encoding
from srpo_lightning.policies import WanPolicy
from tests.families import tiny_wan

PROMPTS = ["a cat", "3 dogs,  running&amp;jumping \n in the park"]
VARIANTS = {
    "unipc": ({}, (48, 32)),
    "euler": ({"multistep": False}, (48, 32)),
    "fine": ({"vae": tiny_wan.FINE}, (64, 32)),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory) -> WanPolicy:
    changes, size = VARIANTS[request.param]
    policy = WanPolicy(str(tiny_wan.write(tmp_path_factory.mktemp(request.param), **changes)), *size)
    policy.load()
    return policy


@torch.no_grad()
def test_pictures_are_the_pipelines_at_each_number_of_steps(variant):
    text = variant.encoder(Encoding()).text
    features, none = (Text.collate(text.encode(own), text.ragged) for own in (PROMPTS, [text.negative]))
    conditions = Conditions(PROMPTS, features, torch.arange(2), unconditional=none)
    noise = sample_noise(0, [0, 1], variant.latent_shape())
    pipe = diffusers.WanPipeline.from_pretrained(variant.pretrained)
    pipe.set_progress_bar_config(disable=True)
    told = dict(variant.pipeline_arguments(5.0, text.max_sequence_length), output_type="pt")
    height, width = variant.size
    for num_steps in (1, 7):
        x0 = variant.integrate(lambda x, s: variant(x, s, conditions, 5.0), noise, num_steps)
        theirs = pipe(PROMPTS, None, height, width, num_inference_steps=num_steps, latents=noise[:, :, None], **told)
        torch.testing.assert_close(variant.decode(x0), theirs.frames[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_steps", [3, 50])
def test_levels_are_the_schedulers(variant, num_steps):
    scheduler = diffusers.WanPipeline.from_pretrained(variant.pretrained).scheduler
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(variant.sigmas(num_steps).float(), scheduler.sigmas.float(), rtol=0, atol=2e-6)


def test_a_recomputed_decoder_has_the_gradient_of_the_whole_vae(variant):
    latents = torch.randn(2, *variant.latent_shape(), requires_grad=True)
    plain = variant.vae.video.decode((latents * variant.vae.std + variant.vae.mean)[:, :, None]).sample[:, :, 0]
    weight = torch.randn_like(plain)
    expected = torch.autograd.grad((weight * (plain / 2 + 0.5).clamp(0, 1)).sum(), latents)
    for recomputes in (False, True):
        policy = WanPolicy(variant.pretrained, *variant.size, vae_checkpointing=recomputes)
        policy.load()
        found = torch.autograd.grad((weight * policy.decode(latents)).sum(), latents)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_encoded_pictures_come_back_as_latents_of_the_same_scale(variant):
    policy_latents = variant.from_vae(variant.vae, variant.vae.encode(torch.rand(1, 3, *variant.size)).latent_dist.mean)
    assert policy_latents.shape[1:] == variant.latent_shape()
    z = variant.to_vae(variant.vae, policy_latents, variant.size)
    torch.testing.assert_close(variant.from_vae(variant.vae, z), policy_latents)


def test_sizes_are_multiples_of_the_models_own_cells(variant):
    cell = 32 if variant.factor == 16 else 16
    with pytest.raises(ValueError, match=f"width is {3 * cell // 2} pixels, which {cell} does not divide"):
        WanPolicy(variant.pretrained, cell, 3 * cell // 2)
