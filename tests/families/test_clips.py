"""A run on clips by the command line: what a reward, a judge, pictures and records see of them."""

import base64
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from srpo_lightning import phases
from srpo_lightning.batch import Conditions, Text
from srpo_lightning.callbacks import RewardTracking
from srpo_lightning.callbacks.measures import encoder_of_pictures
from srpo_lightning.cli import main
from srpo_lightning.config.arguments import read_config
from srpo_lightning.draws import Draws
from srpo_lightning.encoding import Encoding
from srpo_lightning.evaluation.pictures import clip_if_whole, read_record
from srpo_lightning.jobs.estimate.prediction import predict, quiet
from srpo_lightning.jobs.estimate.step import LastFrames
from srpo_lightning.jobs.pictures import read_pictures
from srpo_lightning.objectives import DirectAlign
from srpo_lightning.picture_statistics import consistency, evenly, flicker, motion, over_frames
from srpo_lightning.policies import WanPolicy
from srpo_lightning.rewards import ClipReward, Reward, Term, WeightedReward
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.families import tiny_wan
from tests.families.test_families import Red, write_config
from tests.notebooks import NOTEBOOKS, executed
from tests.refusals import refused


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return tiny_wan.CASE._replace(folder=tiny_wan.write(tmp_path_factory.mktemp("wan")))


@pytest.fixture
def config(case, models, tmp_path) -> str:
    path = write_config(case, models, tmp_path / "run", tmp_path, num_frames=5)
    settings, usual = json.loads(path.read_text()), tiny.config(models, tmp_path / "run", tmp_path / "features")
    (tracking,) = (own for own in usual["trainer"]["callbacks"] if own["class_path"].endswith(".RewardTracking"))
    tracking["init_args"]["metrics"] = {
        "rewarded_motion": {"class_path": "srpo_lightning.rewards.Motion", "init_args": {"target": 1.0}}
    }
    settings["trainer"] |= {"callbacks": usual["trainer"]["callbacks"], "num_sanity_val_steps": -1}
    path.write_text(json.dumps(settings))
    return str(path)


def test_a_run_measures_motion_shows_strips_and_goes_on_where_it_was_stopped(config, tmp_path):
    main(["fit", "--config", config])
    run = RunFolder(tmp_path / "run")
    for record in run.read_metrics():
        assert record["motion"] > 0
        assert record["flicker"] > 0
        assert 0 < record["rewarded_motion"] < 1
        assert -1 <= record["consistency"] < 1
        assert "win/consistency" not in record
        assert "win/motion" not in record
    strip = next((tmp_path / "run" / "samples").rglob("*.png"))
    assert read_record(strip)["num_frames"] == 5
    with pytest.raises(ValueError, match=r"00000.png is a strip of a clip's frames.*num_frames 1"):
        read_pictures(str(strip.parent), str(tmp_path / "run" / "samples" / "metadata.jsonl"))
    with Image.open(strip) as picture:
        assert picture.size == (5 * 32, 32)
    with Image.open(strip.with_suffix(".webp")) as clip:
        assert (clip.n_frames, clip.size) == (5, (32, 32))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "motion" in page
    (shown, *_) = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", page)
    assert Image.open(io.BytesIO(base64.b64decode(shown))).n_frames == 5
    with Image.open(tmp_path / "run" / "before_after.webp") as sheet:
        assert sheet.n_frames == 5
    (notebook,) = (own for own in NOTEBOOKS if own.stem == "inspect_samples")
    told = "".join(
        output.get("data", {}).get("text/html", "")
        for cell in executed(notebook, tmp_path / "run").cells
        for output in cell.get("outputs", [])
    )
    assert "data:image/webp;base64," in told
    exported = ["--config", str(tmp_path / "run" / "config.yaml"), "--output", str(tmp_path / "out")]
    main(["export", *exported, "--dtype", "float32", "--weights", "policy"])
    with Image.open(tmp_path / "out" / "check" / "clips.webp") as clips:
        assert clips.n_frames == 5
    assert 'clip[0].save("clip.webp"' in (tmp_path / "out" / "README.md").read_text()
    again = tmp_path / "again"
    words = ["fit", "--config", config, "--trainer.default_root_dir", str(again)]
    main([*words, "--trainer.max_steps", "2"])
    main([*words, "--ckpt_path", "last"])
    ends = [torch.load(own.checkpoint(4), weights_only=True)["state_dict"] for own in (run, RunFolder(again))]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_predict_writes_clips_beside_their_strips_and_draws_a_lost_one_again(config, tmp_path, caplog):
    words = ["predict", "--config", config, "--output", str(tmp_path / "drawn")]
    main(words)
    strips = sorted((tmp_path / "drawn").rglob("*.png"))
    clips = [strip.with_suffix(".webp") for strip in strips]
    assert strips
    assert all(len(clip_if_whole(clip)) == 5 for clip in clips)
    clips[0].unlink()
    caplog.set_level("INFO")
    main(words)
    assert f"0 drawn, {len(clips) - 1} kept, 1 drawn again" in caplog.text
    assert clips[0].is_file()


def test_clips_are_trained_on_in_the_place_of_rollouts_and_a_picture_is_refused(config, tmp_path, capsys, caplog):
    folder = tmp_path / "clips"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    np.save(folder / "a.npy", pixels)
    first, *rest = map(Image.fromarray, pixels)
    first.save(folder / "b.webp", save_all=True, append_images=rest, lossless=True)
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(f"a {name}")
    words = ["fit", "--config", config, "--data.images", str(folder), "--data.offline_ratio", "1.0"]
    main([*words, "--trainer.max_steps", "1", "--trainer.callbacks", "[]"])
    assert "pictures: 2 to train on; latents: 2 computed" in caplog.text
    Image.new("RGB", (32, 32)).save(folder / "c.png")
    (folder / "c.txt").write_text("a c")
    words += ["--trainer.default_root_dir", str(tmp_path / "other")]
    refused(words, "c.png has 1 frame, fewer than the 5 of the policy's num_frames", capsys)


def test_a_clip_is_encoded_as_the_causal_vae_encodes_it_from_its_beginning_on(case):
    policy = WanPolicy(str(case.folder), 32, 32, num_frames=9)
    clip = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0))
    encoder = policy.encoder(Encoding())
    assert encoder.num_frames == 9
    assert encoder.images is not None
    found = encoder.images().encode(clip)
    assert found.shape[1:] == policy.latent_shape()
    vae = AutoencoderKLWan.from_pretrained(case.folder / "vae")
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = (vae.encode(clip * 2 - 1).latent_dist.mode() - mean) / std
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(encoder.images().encode(clip[:, :, 0])[:, :, 0], found[:, :, 0])


def test_rewards_are_the_mean_over_the_chosen_frames_and_their_gradient_ends_there(case):
    policy = WanPolicy(str(case.folder), 32, 32, num_frames=9, rewarded_frames="first", num_rewarded_frames=2)
    policy.load()
    conditions = of_one_prompt(policy)
    latents = torch.randn(1, *policy.latent_shape(), requires_grad=True)
    found = DirectAlign().rewards(policy, Red(), latents, conditions, Draws(0))
    clip = policy.decode(latents)
    expected = sum(Red()(clip[:, :, frame], ["a cat"]) for frame in (0, 1)) / 2
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), latents)
    assert gradient[:, :, :2].any()
    assert not gradient[:, :, 2].any()


class LastRed(Reward):
    """Compares the last frame that it is shown with the first."""

    reads_clips = True
    reads_text = False

    def forward(self, images, texts):
        assert images.shape[2] == 3
        return images[:, 0, -1].mean((1, 2)) - images[:, 0, 0].mean((1, 2))


def of_one_prompt(policy: WanPolicy) -> Conditions:
    text = policy.encoder(Encoding()).text
    return Conditions(["a cat"], Text.collate(text.encode(["a cat"]), text.ragged), torch.arange(1))


def test_a_reward_that_reads_clips_gets_the_rewarded_frames_together(case):
    policy = WanPolicy(str(case.folder), 32, 32, num_frames=9, num_rewarded_frames=3)
    policy.load()
    conditions = of_one_prompt(policy)
    latents = torch.randn(1, *policy.latent_shape(), requires_grad=True)
    clip = policy.decode(latents)
    assert list(policy.shown_frames) == [0, 4, 8]
    for reward in (LastRed(), WeightedReward([Term(LastRed()), Term(Red(), 0.5)])):
        found = DirectAlign().rewards(policy, reward, latents, conditions, Draws(0))
        red = [Red()(clip[:, :, frame], ["a cat"]) for frame in (0, 4, 8)]
        expected = LastRed()(clip[:, :, [0, 4, 8]], ["a cat"]) + (reward.reads_text * 0.5) * sum(red) / 3
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(own.sum(), latents, retain_graph=True)[0] for own in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_a_reward_that_reads_clips_is_refused_where_a_step_shows_it_one_frame(config, tmp_path, capsys):
    settings = json.loads(Path(config).read_text())
    settings["model"]["reward"] = {"class_path": "srpo_lightning.rewards.Motion", "init_args": {"target": 0.1}}
    settings["model"]["objective"] = {"class_path": "srpo_lightning.objectives.DirectAlign"}
    path = tmp_path / "motion.json"
    path.write_text(json.dumps(settings))
    words = ["--model.policy.init_args.num_rewarded_frames", "1"]
    refused(["fit", "--config", str(path), *words], "set num_frames and num_rewarded_frames of a policy of", capsys)


class ReadsClips(ClipReward):
    reads_clips = True


def test_features_are_of_the_first_encoder_of_pictures_also_in_a_sum(models):
    pictures, clips = tiny.new_reward(models.clip), ReadsClips(models.judge)
    assert encoder_of_pictures([clips, LastRed()]) is None
    assert encoder_of_pictures([clips, WeightedReward([Term(clips), Term(pictures)])]) is pictures
    tracking = RewardTracking(judge=tiny.new_reward(models.judge), metrics={"other": pictures})
    shown = torch.rand(2, 3, 5, 16, 16)
    tracking.judge.reads_clips = True
    tracking.judge.image_features = lambda seen: seen.mean((2, 3, 4))  # of whole clips
    tracking.frame_encoder = encoder_of_pictures(tracking.models)
    features, told = tracking.features(shown)
    torch.testing.assert_close(features, shown.mean((2, 3, 4)))
    each = [pictures.image_features(frame) for frame in shown.unbind(2)]
    by_hand = sum(torch.cosine_similarity(a, b) for a, b in pairwise(each)) / 4
    torch.testing.assert_close(told["consistency"], by_hand)


def test_consistency_of_features_that_are_known():
    features = torch.tensor([[[1.0, 0]], [[2, 0]], [[0, 3]]])
    assert consistency(features) == pytest.approx(0.5)


def test_motion_and_flicker_of_clips_that_are_known():
    still = torch.rand(1, 3, 1, 8, 8).expand(-1, -1, 5, -1, -1)
    assert motion(still) == flicker(still) == 0
    ramp = torch.linspace(0, 1, 5).view(1, 1, 5, 1, 1).expand(1, 3, 5, 8, 8)
    assert motion(ramp) == pytest.approx(0.25)
    assert flicker(ramp) == pytest.approx(0, abs=1e-6)
    blinking = torch.tensor([0.0, 1, 0, 1, 0]).view(1, 1, 5, 1, 1).expand(1, 3, 5, 8, 8)
    assert (motion(blinking), flicker(blinking)) == (pytest.approx(1), pytest.approx(1))


def test_numbers_of_pictures_are_means_over_frames_of_a_clip():
    clips = torch.rand(2, 3, 9, 4, 4)
    assert evenly(4, 9) == [0, 3, 5, 8]
    expected = clips[:, :, [0, 3, 5, 8]].mean((1, 2, 3, 4))
    torch.testing.assert_close(over_frames(clips, lambda shown: shown.mean((1, 2, 3))), expected)
    pictures = clips[:, :, 0]
    assert torch.equal(over_frames(pictures, lambda shown: shown), pictures)


def test_the_decoding_of_chosen_frames_is_a_phase_of_the_memory_that_is_predicted(case):
    policy = case.new(num_frames=9)
    latents = torch.randn(1, *policy.latent_shape(), requires_grad=True)
    seen = SimpleNamespace(phase="")
    with phases.followed_by(seen):
        rewards = DirectAlign().rewards(policy, Red(), latents, of_one_prompt(policy), Draws(0))
        assert seen.phase == phases.REWARD
        rewards.sum().backward()
    assert seen.phase == phases.DECODE


def test_frames_that_are_drawn_are_predicted_as_the_last_ones(case, models, tmp_path):
    """So no step takes more than was predicted, whatever it draws."""
    found = {}
    for choice, number in (("random", 1), ("first", 1), ("first", 9)):
        policy = {"num_frames": 9, "rewarded_frames": choice, "num_rewarded_frames": number}
        config = read_config(str(write_config(case, models, tmp_path / "run", tmp_path, **policy)))
        config.trainer.callbacks = None
        with quiet():
            found[choice, number] = predict(config, "cpu").peaks[phases.DECODE].total
    assert found["first", 1] < 0.8 * found["random", 1]
    assert found["random", 1] == pytest.approx(found["first", 9], rel=0.2)
    assert LastFrames(0).subset("frames", [1.0] * 9, 2) == [7, 8]
    assert LastFrames(0).subset("steps", [1.0] * 9, 2) == Draws(0).subset("steps", [1.0] * 9, 2)
