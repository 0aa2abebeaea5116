"""What Wan alone has: two samplers, a text that is cleaned, a finer VAE in the model of 5 B."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from srpo_lightning.batch import Conditions, Text
from srpo_lightning.draws import Draws, sample_noise
from srpo_lightning.encoding import Encoding
from srpo_lightning.jobs.export.lora_formats import LoraComfy, LoraFiles
from srpo_lightning.jobs.export.weights import Stored
from srpo_lightning.policies import Lora, WanPolicy
from srpo_lightning.policies.clips import chosen_frames
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
        theirs = pipe(PROMPTS, None, height, width, num_inference_steps=num_steps, latents=noise, **told)
        torch.testing.assert_close(variant.decode(x0), theirs.frames[:, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_prompts_that_are_cut_shorter_are_drawn_as_the_card_tells_the_pipeline(variant):
    text = variant.encoder(Encoding(max_sequence_length=8)).text
    features, none = (Text.collate(text.encode(own), text.ragged) for own in (["a cat"], [text.negative]))
    conditions = Conditions(["a cat"], features, torch.arange(1), unconditional=none)
    noise = sample_noise(0, [0], variant.latent_shape())
    pipe = diffusers.WanPipeline.from_pretrained(variant.pretrained)
    pipe.set_progress_bar_config(disable=True)
    told = dict(variant.pipeline_arguments(5.0, text.max_sequence_length), output_type="pt")
    x0 = variant.integrate(lambda x, s: variant(x, s, conditions, 5.0), noise, 3)
    theirs = pipe(["a cat"], None, *variant.size, num_inference_steps=3, latents=noise, **told)
    torch.testing.assert_close(variant.decode(x0), theirs.frames[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_steps", [3, 50])
def test_levels_are_the_schedulers(variant, num_steps):
    scheduler = diffusers.WanPipeline.from_pretrained(variant.pretrained).scheduler
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(variant.sigmas(num_steps).float(), scheduler.sigmas.float(), rtol=0, atol=2e-6)


def test_a_recomputed_decoder_has_the_gradient_of_the_whole_vae(variant):
    latents = torch.randn(2, *variant.latent_shape(), requires_grad=True)
    plain = variant.vae.video.decode(latents * variant.vae.std + variant.vae.mean).sample[:, :, 0]
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
    torch.testing.assert_close(variant.from_vae(variant.vae, z[:, :, 0]), policy_latents)


def test_sizes_are_multiples_of_the_models_own_cells(variant):
    cell = 32 if variant.factor == 16 else 16
    with pytest.raises(ValueError, match=f"width is {3 * cell // 2} pixels, which {cell} does not divide"):
        WanPolicy(variant.pretrained, cell, 3 * cell // 2)


def test_a_shift_by_the_resolution_is_refused(variant):
    for value in (True, False):
        with pytest.raises(ValueError, match=r"resolution_shift is \w+, but .* Wan .*: set it to null"):
            WanPolicy(variant.pretrained, *variant.size, resolution_shift=value)


@torch.no_grad()
def test_no_step_reads_a_file_or_asks_the_hub(variant, monkeypatch):
    """As it would in every pass of a model by its hub id, which one answer that does not come would end."""
    conditions = Conditions(["a"], Text({"prompt_embeds": torch.randn(1, 5, 16)}), torch.arange(1))
    variant(sample_noise(0, [0], variant.latent_shape()), torch.ones(1), conditions, 1.0)  # once it may

    def refused(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr("srpo_lightning.files.pretrained.part", refused)
    monkeypatch.setattr(diffusers.UniPCMultistepScheduler, "from_pretrained", refused)
    noise = sample_noise(0, [0], variant.latent_shape())
    variant(noise, torch.ones(1), conditions, 1.0)
    assert len(variant.sigmas(3)) == 4
    assert variant.integrate(lambda x, level: x, noise, 2).shape == noise.shape


FRAMES = {"coarse": ({}, 9), "fine": ({"vae": tiny_wan.FINE}, 9)}


@pytest.fixture(scope="module", params=FRAMES)
def clips(request, tmp_path_factory) -> WanPolicy:
    changes, num_frames = FRAMES[request.param]
    folder = tiny_wan.write(tmp_path_factory.mktemp(f"clips_{request.param}"), **changes)
    policy = WanPolicy(str(folder), 32, 32, num_frames=num_frames)
    policy.load()
    return policy


@torch.no_grad()
def test_clips_are_the_pipelines(clips):
    text = clips.encoder(Encoding()).text
    features, none = (Text.collate(text.encode(own), text.ragged) for own in (PROMPTS, [text.negative]))
    conditions = Conditions(PROMPTS, features, torch.arange(2), unconditional=none)
    noise = sample_noise(0, [0, 1], clips.latent_shape())
    pipe = diffusers.WanPipeline.from_pretrained(clips.pretrained)
    pipe.set_progress_bar_config(disable=True)
    told = dict(clips.pipeline_arguments(5.0, text.max_sequence_length), output_type="pt")
    x0 = clips.integrate(lambda x, s: clips(x, s, conditions, 5.0), noise, 3)
    theirs = pipe(PROMPTS, None, 32, 32, num_inference_steps=3, latents=noise, **told).frames
    assert theirs.shape == (2, 9, 3, 32, 32)
    torch.testing.assert_close(clips.decode(x0).transpose(1, 2), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("wanted", [[0], [4], [0, 3], [8], range(9)], ids=str)
def test_chosen_frames_have_the_pixels_and_gradients_of_the_whole_clip(clips, recomputes, wanted):
    latents = torch.randn(1, *clips.latent_shape(), requires_grad=True)
    whole = clips.vae.video.decode(latents * clips.vae.std + clips.vae.mean).sample / 2 + 0.5
    weight = torch.randn(len(wanted), *whole.shape[-2:])
    expected = torch.stack([whole[0, :, frame] for frame in wanted])
    policy = WanPolicy(clips.pretrained, 32, 32, num_frames=9, vae_checkpointing=recomputes)
    policy.load()
    found = torch.cat(policy.frames(latents, wanted))
    torch.testing.assert_close(found, expected.clamp(0, 1), rtol=0, atol=1e-5)
    gradients = [
        torch.autograd.grad((own * weight[:, None]).sum(), latents)[0] for own in (found, expected.clamp(0, 1))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert bool(gradients[0][:, :, -1].any()) == (max(wanted) > 4)


def test_latents_behind_the_last_chosen_frame_are_not_decoded(clips, monkeypatch):
    decoded = []
    forward = clips.vae.video.decoder.forward
    monkeypatch.setattr(
        clips.vae.video.decoder, "forward", lambda x, **own: decoded.append(x.shape[2]) or forward(x, **own)
    )
    for wanted, latent_frames in (([0], 1), ([1], 2), ([4], 2), ([5], 3)):
        decoded.clear()
        clips.frames(torch.randn(1, *clips.latent_shape()), wanted)
        assert decoded == [1] * latent_frames


def test_a_reward_sees_the_frames_that_are_chosen():
    draws = Draws(0, step=3)
    assert chosen_frames("first", 2, 9, draws) == [0, 1]
    assert chosen_frames("even", 1, 9, draws) == [4]
    assert chosen_frames("even", 3, 9, draws) == [0, 4, 8]
    assert chosen_frames("even", 20, 9, draws) == list(range(9))
    drawn = {tuple(chosen_frames("random", 2, 9, Draws(0, step=step))) for step in range(500)}
    assert len(drawn) == 9 * 8 // 2
    assert chosen_frames("random", 2, 9, draws) == chosen_frames("random", 2, 9, draws._replace(rank=1))


def test_a_number_of_frames_that_the_vae_cannot_make_is_refused(clips):
    with pytest.raises(ValueError, match=r"num_frames is 8, and a clip has one more than a multiple of 4 .* 5 or 9"):
        WanPolicy(clips.pretrained, 32, 32, num_frames=8)


def test_a_clip_that_is_recomputed_is_decoded_in_tiles_where_no_gradient_is_asked_for(clips, monkeypatch):
    """The tiles keep what they hand on in time, and so cannot be recomputed."""
    policy = WanPolicy(clips.pretrained, 32, 32, num_frames=9, vae_checkpointing=True, vae_tiling=True)
    policy.load()
    latents = torch.randn(1, *policy.latent_shape())
    saved = [bytes_saved(own, latents.clone().requires_grad_()) for own in (policy, checkpointed(clips))]
    assert saved[0] == saved[1]
    monkeypatch.setattr(policy.vae.video, "decode", lambda *_, **__: pytest.fail("in tiles"))
    policy.frames(latents.requires_grad_(), [8])
    with pytest.raises(pytest.fail.Exception, match="in tiles"), torch.no_grad():
        policy.frames(latents, [8])


def checkpointed(clips: WanPolicy) -> WanPolicy:
    policy = WanPolicy(clips.pretrained, 32, 32, num_frames=9, vae_checkpointing=True)
    policy.load()
    return policy


def bytes_saved(policy: WanPolicy, latents: torch.Tensor) -> int:
    """What is kept for the backward pass of the last frame."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.nbytes), x)[1], lambda x: x):
        policy.frames(latents, [8])
    return sum(kept)


def test_adapters_for_comfyui_have_the_names_of_the_first_publication(variant, tmp_path):
    """Diffusers' are not known there for Wan: "lora key not loaded"."""
    policy = WanPolicy(variant.pretrained, *variant.size, adapter=Lora(rank=2))
    outline = policy.outline()
    trained = {
        name: Stored(tuple(p.shape), lambda shape=p.shape: torch.ones(shape))
        for name, p in outline.named_parameters()
        if ".lora_" in name
    }
    written = LoraComfy(policy, outline, trained, torch.float32, "own")
    written.write(tmp_path)
    names = load_file(tmp_path / "own.safetensors").keys()
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in names
    assert all(name.startswith("diffusion_model.blocks.") for name in names)
    assert len(names) == 3 * len(written.layers)
    assert "--format lora-comfy" in LoraFiles(policy, outline, trained, torch.float32, "own").comfyui
    changed = written.given(tmp_path)["transformer"].blocks[0].attn1.to_q.weight
    assert not torch.equal(changed, variant.transformer.blocks[0].attn1.to_q.weight)
