"""The built-in model of clips as plain diffusers and transformers see it: none of our loading code takes part."""

import pytest
import torch
from diffusers import WanPipeline
from torch.nn import functional
from transformers import CLIPTokenizer, XCLIPModel

from srpo_lightning.config.shipped import ASSETS
from tools.moving.motions import MOTIONS

pytestmark = pytest.mark.filterwarnings("ignore")  # of two libraries about themselves; ours do not show here

THINGS = ("red apple", "flat. bus", "ink. guitar", "penguin")
ASKED = [(thing, motion) for thing in THINGS for motion in MOTIONS]


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(ASSETS / "moving-wan", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def clips(pipeline: WanPipeline) -> torch.Tensor:
    """Every thing in every motion, [20, 9, 3, 64, 64]."""
    return pipeline(
        [f"{thing}, {motion}" for thing, motion in ASKED],
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=20,
        guidance_scale=2.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames


def seen(folder: str, clips: torch.Tensor, texts: list[str]) -> list[str]:
    """The text that is nearest to each clip, computed with nothing but transformers."""
    model = XCLIPModel.from_pretrained(ASSETS / folder, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(ASSETS / folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        ours = model.get_video_features((clips - 0.5) / 0.5).pooler_output
        theirs = model.get_text_features(**tokens).pooler_output
    best = (functional.normalize(ours, dim=-1) @ functional.normalize(theirs, dim=-1).T).argmax(1)
    return [texts[number] for number in best.tolist()]


@pytest.mark.parametrize("critic", ["moving-xclip", "moving-judge"])
def test_each_critic_sees_the_motion_that_a_prompt_asked_for(clips: torch.Tensor, critic: str):
    """85 % were wanted of many; fourteen of these twenty allow for chance, where a guess is right in four."""
    assert clips.shape == (20, 9, 3, 64, 64)
    right = [found == motion for found, (_, motion) in zip(seen(critic, clips, list(MOTIONS)), ASKED, strict=True)]
    assert sum(right) >= 14, right


@pytest.mark.parametrize("critic", ["moving-xclip", "moving-judge"])
def test_texts_are_read_at_their_end(critic: str):
    """XCLIPModel reads a text at its highest number."""
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / critic)
    assert tokenizer.eos_token_id == len(tokenizer) - 1


def test_latents_of_drawn_clips_have_about_unit_variance(pipeline: WanPipeline, clips: torch.Tensor):
    with torch.no_grad():
        latents = pipeline.vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mean
        back = pipeline.vae.decode(latents).sample / 2 + 0.5
    assert latents.shape == (20, 16, 3, 8, 8)
    assert 0.6 < latents.std() < 1.6
    assert (back.transpose(1, 2) - clips).square().mean() < 0.01


def test_the_pipeline_has_at_most_15_million_bytes():
    assert sum(path.stat().st_size for path in (ASSETS / "moving-wan").rglob("*") if path.is_file()) <= 15_000_000
