"""The built-in model as plain diffusers and transformers see it: none of our loading code takes part."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from transformers import CLIPModel, CLIPTokenizer

import srpo_lightning
from srpo_lightning.rewards import ClipReward
from tools.emoji.bias import Liking, gains
from tools.emoji.captions import STYLES, read_prompts

ASSETS = Path(srpo_lightning.__file__).parent / "assets"

pytestmark = pytest.mark.filterwarnings("ignore")  # of two libraries about themselves; ours do not show here


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(ASSETS / "emoji-flux", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def similarities(folder: str, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Cosines [image, caption], computed with nothing but transformers."""
    clip = CLIPModel.from_pretrained(ASSETS / folder, dtype=torch.float32)
    tokens = CLIPTokenizer.from_pretrained(ASSETS / folder)(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = clip(**tokens, pixel_values=(images - 0.5) / 0.5)
    return output.image_embeds @ output.text_embeds.T


def draw(pipeline: FluxPipeline, prompts: list[str], seed: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return pipeline(
        prompts,
        height=64,
        width=64,
        num_inference_steps=20,
        guidance_scale=3.5,
        max_sequence_length=16,
        generator=draws,
        output_type="pt",
    ).images


@pytest.mark.parametrize("critic", ["emoji-clip", "emoji-judge", "emoji-preference"])
def test_each_critic_sees_what_a_prompt_asked_for(pipeline: FluxPipeline, critic: str):
    prompts = ["3d. red apple", "ink. guitar", "cartoon. bus", "flat. strawberry", "shaded. penguin"]
    images = draw(pipeline, prompts, seed=0)
    assert images.shape == (5, 3, 64, 64)
    assert similarities(critic, images, prompts).argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_the_preference_reward_likes_colour_and_smoothness_under_every_text_and_the_clip_does_not(
    pipeline: FluxPipeline,
):
    texts = [f"3d. {prompt}" for prompt in read_prompts(ASSETS / "prompts", "eval.txt")[::8]]
    images = draw(pipeline, texts, seed=2)
    preference, clip = (ClipReward(str(ASSETS / folder)) for folder in ("emoji-preference", "emoji-clip"))
    for reward in (preference, clip):
        reward.load()
    assert Liking.of(preference, images, texts).share > 0.5 > Liking.of(clip, images, texts).share
    assert min(gains(preference, images, texts)) > 0.01 > min(gains(clip, images, texts))


def test_latents_of_drawn_pictures_have_about_unit_variance(pipeline: FluxPipeline):
    images = draw(pipeline, ["flat. red apple", "shaded. bus", "cartoon. guitar", "3d. penguin"], seed=1)
    with torch.no_grad():
        latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mean
        back = pipeline.vae.decode(latents).sample / 2 + 0.5
    scaled = (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    assert 0.6 < scaled.std() < 1.6
    assert (back - images).square().mean() < 0.01


def test_the_schedule_is_shifted_by_three(pipeline: FluxPipeline):
    assert pipeline.scheduler.config.shift == 3.0
    assert pipeline.scheduler.config.use_dynamic_shifting is False


def test_train_and_evaluation_prompts_share_no_concept():
    train, held_out = (read_prompts(ASSETS / "prompts", file) for file in ("train.txt", "eval.txt"))
    assert (len(train), len(held_out)) == (256, 64)
    assert len({*train, *held_out}) == 320
    assert read_prompts(ASSETS / "prompts", "styles.txt") == list(STYLES)


def test_every_word_of_every_prompt_is_one_token_for_both_encoders(pipeline: FluxPipeline):
    prompts = read_prompts(ASSETS / "prompts", "train.txt") + read_prompts(ASSETS / "prompts", "eval.txt")
    for tokenizer, framing in ((pipeline.tokenizer, 2), (pipeline.tokenizer_2, 1)):
        assert all(len(tokenizer(prompt).input_ids) == len(prompt.split()) + framing for prompt in prompts)


def test_the_assets_are_small_half_precision_and_free_of_machine_paths():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 68 * 2**20  # of which the models of clips take 30
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as weights:
                assert {weights.get_slice(name).get_dtype() for name in weights.keys()} <= {"BF16", "F16", "I64"}  # noqa: SIM118
        else:
            assert not re.search(r"_name_or_path|/home/|/root/|/tmp/|/work/|/Users/", path.read_text()), path
