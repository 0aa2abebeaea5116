"""The moving world: what moves, what is written under it, and networks that are Wan's and X-CLIP's."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from transformers import CLIPModel, CLIPTokenizer

from srpo_lightning.config.shipped import ASSETS
from srpo_lightning.files.pretrained import load_whole
from tools.emoji.augment import Augmentation
from tools.emoji.captions import STYLES
from tools.emoji.clip import text_features, token_ids
from tools.emoji.world import World
from tools.moving import build, vae
from tools.moving.captions import Captions, caption
from tools.moving.motions import MOTIONS, NUM_FRAMES, Poses, clips, layers_of, poses
from tools.moving.xclip import augmented, new_tokenizer, new_xclip

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries about themselves


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def square() -> torch.Tensor:
    """A red square left of a blue one, [1, 4, 64, 64]."""
    layers = torch.zeros(1, 4, 64, 64)
    layers[:, 0, 24:40, 16:32] = 1
    layers[:, 2, 24:40, 32:48] = 1
    layers[:, 3, 24:40, 16:48] = 1
    return layers


def centres(shown: torch.Tensor) -> torch.Tensor:
    """Centre of what is not white in each frame, [N, F, 2] as (row, column) in pixels."""
    dark = (1 - shown.amin(1)).flatten(2)
    rows, columns = (own.flatten().float() for own in torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij"))
    return torch.stack([(dark * rows).sum(-1), (dark * columns).sum(-1)], -1) / dark.sum(-1)[..., None]


def of(motion: str, count: int = 40) -> Poses:
    return poses(torch.full((count,), MOTIONS.index(motion)), drawn())


def test_a_pose_moves_turns_and_scales_the_icon():
    still = torch.zeros(1, 1)
    right = clips(square(), Poses(still + 0.25, still, still, still + 1))
    down = clips(square(), Poses(still, still + 0.25, still, still + 1))
    start = clips(square(), Poses(still, still, still, still + 1))
    torch.testing.assert_close(centres(right) - centres(start), torch.tensor([[[0.0, 8.0]]]), rtol=0, atol=1e-3)
    torch.testing.assert_close(centres(down) - centres(start), torch.tensor([[[8.0, 0.0]]]), rtol=0, atol=1e-3)
    half = clips(square(), Poses(still, still, still, still + 0.5))
    assert float((1 - half.amin(1)).sum() / (1 - start.amin(1)).sum()) == pytest.approx(0.25, abs=0.01)
    turned = clips(square(), Poses(still, still, still + torch.pi / 2, still + 1))[0, :, 0]  # left goes up
    assert turned[0, 24, 32] > 0.9 > 0.1 > turned[2, 24, 32]
    assert turned[2, 40, 32] > 0.9 > 0.1 > turned[0, 40, 32]


def test_each_motion_changes_what_it_is_named_after_and_nothing_else():
    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.amax(1) - values.amin(1)

    for motion in MOTIONS:
        where = of(motion)
        changed = {name: bool((spread(own) > 1e-4).all()) for name, own in where._asdict().items()}
        still = {name: bool((spread(own) < 1e-4).all()) for name, own in where._asdict().items()}
        wanted = {
            "bouncing": {"down"},
            "spinning": {"angle"},
            "sliding": {"right"},
            "pulsing": {"scale"},
            "shaking": {"right", "angle"},
        }[motion]
        assert {name for name, is_changed in changed.items() if is_changed} == wanted
        assert {name for name, is_still in still.items() if is_still} == set(changed) - wanted
    turns = of("spinning").angle.diff(dim=1)
    assert ((turns > 0.4).all(1) | (turns < -0.4).all(1)).all()  # in one direction
    quick = of("shaking").angle.diff(dim=1).sign()
    assert (quick[:, 1:] != quick[:, :-1]).float().mean() > 0.4  # to and fro within three frames


def test_clips_are_reproducible_and_differ():
    first, again, other = (poses(torch.zeros(3, dtype=torch.long), drawn(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.down, again.down)
    assert not torch.equal(first.down, other.down)
    assert not torch.equal(first.down[0], first.down[1])


def test_a_caption_is_drawn_of_what_its_clip_shows():
    concepts = ["red apple", "bus", "cat"]
    captions = Captions.of(concepts)
    assert len(set(captions.texts)) == len(captions.texts)
    rows = torch.arange(len(concepts) * len(STYLES) * len(MOTIONS)).repeat(20)
    seen = set()
    for row, number in zip(rows.tolist(), captions.draw(rows, drawn()).tolist(), strict=True):
        concept, style, motion = concepts[row // 25], STYLES[row // 5 % 5], MOTIONS[row % 5]
        forms = {
            caption(style, concept, motion),
            caption("", concept, motion),
            caption(style, concept, ""),
            concept,
            "",
        }
        assert captions.texts[number] in forms
        seen.add(sorted(forms).index(captions.texts[number]) if captions.texts[number] else "empty")
    assert "empty" in seen
    assert caption("3d", "red apple", "spinning") == "3d. red apple, spinning"


@pytest.mark.parametrize("num_frames", [1, 9])
def test_coding_in_two_pieces_is_the_models_own(num_frames):
    torch.manual_seed(0)
    model = vae.new_vae().eval()
    shown = torch.rand(2, 3, num_frames, 64, 64, generator=drawn())
    with torch.no_grad():
        latents = model.encode(shown * 2 - 1).latent_dist.mean
        decoded = model.decode(latents).sample
        vae.as_pictures(model)
        torch.testing.assert_close(vae.encode(model, shown), latents, rtol=0, atol=1e-4)
        torch.testing.assert_close(vae.decode(model, latents).clamp(-1, 1), decoded, rtol=0, atol=1e-4)


def test_folding_gives_latents_of_mean_0_and_deviation_1():
    torch.manual_seed(0)
    model = vae.new_vae().eval()
    shown = clips(square().expand(10, -1, -1, -1), poses(torch.arange(10) % 5, drawn()))
    vae.fold(model, shown)
    latents = model.encode(shown * 2 - 1).latent_dist
    torch.testing.assert_close(latents.mean.mean((0, 2, 3, 4)), torch.zeros(vae.CHANNELS), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.mean.std((0, 2, 3, 4)), torch.ones(vae.CHANNELS), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std, torch.full_like(latents.std, vae.LATENT_NOISE))


def test_a_ground_is_one_for_all_frames_of_a_clip():
    settings = Augmentation(grounded=1.0, blurred=0.0, noise=0.0, tint=0.0)
    shown = augmented(layers_of(square(), of("sliding", 1)), settings, drawn())
    assert torch.equal(shown[0, :, 0, 0], shown[0, :, -1, 0])
    assert not torch.allclose(shown[0, :, 0, 0], torch.ones(3, 64), atol=0.02)


@pytest.mark.parametrize("pictures", ["emoji-clip", "emoji-judge"])
def test_an_xclip_begins_with_all_that_its_clip_knows(pictures):
    clip = load_whole(CLIPModel, str(ASSETS / pictures), dtype=torch.float32)
    before = CLIPTokenizer.from_pretrained(ASSETS / pictures)
    tokenizer = new_tokenizer([*Captions.of(["red apple", "bus"]).texts[:-1], "zebra crossing"])
    xclip = new_xclip(ASSETS / pictures, tokenizer)
    texts = ["3d. red apple", "ink. bus"]
    known, own = (text_features(model, token_ids(of, texts)) for model, of in ((clip, before), (xclip, tokenizer)))
    torch.testing.assert_close(own, known, rtol=0, atol=1e-5)
    kept = {name for name, value in xclip.named_parameters() if name not in dict(clip.named_parameters())}
    assert all("message" in name or "mit." in name or "prompts_" in name or "pre_layernorm" in name for name in kept)
    torch.testing.assert_close(xclip.vision_model.pre_layernorm.weight, clip.vision_model.pre_layrnorm.weight)


def test_the_build_makes_a_pipeline_that_diffusers_draws_with(tmp_path, monkeypatch):
    """Every stage for two steps, on a world of two things."""
    pictures = np.zeros((2, len(STYLES), 64, 64, 4), np.uint8)
    pictures[..., 16:48, 16:48, :] = np.random.default_rng(0).integers(0, 255, (2, len(STYLES), 1, 1, 4))
    monkeypatch.setattr(build, "build_world", lambda *_: World(["red apple", "bus"], pictures))
    made = build.Build(tmp_path, tmp_path / "assets", build.Steps(2, 2, 2, 2, 2, 2))
    made.everything()
    pipeline = WanPipeline.from_pretrained(tmp_path / "assets" / "moving-wan")
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        "3d. red apple, spinning",
        height=64,
        width=64,
        num_frames=NUM_FRAMES,
        num_inference_steps=2,
        max_sequence_length=16,
        output_type="pt",
    ).frames
    assert frames.shape == (1, NUM_FRAMES, 3, 64, 64)
    assert frames.isfinite().all()
