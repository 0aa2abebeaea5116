"""A run on clips by the command line: what a reward, a judge, pictures and records see of them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from srpo_lightning.batch import Conditions, Text
from srpo_lightning.cli import main
from srpo_lightning.draws import Draws
from srpo_lightning.encoding import Encoding
from srpo_lightning.objectives import DirectAlign
from srpo_lightning.picture_statistics import consistency, evenly, flicker, motion, over_frames
from srpo_lightning.policies import WanPolicy
from srpo_lightning.rewards import Reward, Term, WeightedReward
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.families import tiny_wan
from tests.families.test_families import Red, write_config
from tests.refusals import refused


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return tiny_wan.CASE._replace(folder=tiny_wan.write(tmp_path_factory.mktemp("wan")))


@pytest.fixture
def config(case, models, tmp_path) -> str:
    path = write_config(case, models, tmp_path / "run", tmp_path, num_frames=5)
    settings, usual = json.loads(path.read_text()), tiny.config(models, tmp_path / "run", tmp_path / "features")
    settings["trainer"] |= {"callbacks": usual["trainer"]["callbacks"], "num_sanity_val_steps": -1}
    path.write_text(json.dumps(settings))
    return str(path)


def test_a_run_measures_motion_shows_strips_and_goes_on_where_it_was_stopped(config, tmp_path):
    main(["fit", "--config", config])
    run = RunFolder(tmp_path / "run")
    for record in run.read_metrics():
        assert record["motion"] > 0
        assert record["flicker"] > 0
        assert -1 <= record["consistency"] < 1
        assert "win/consistency" not in record
        assert "win/motion" not in record
    strip = next((tmp_path / "run" / "samples").rglob("*.png"))
    with Image.open(strip) as picture:
        assert picture.size == (5 * 32, 32)
    assert "motion" in (tmp_path / "run" / "report.html").read_text()
    again = tmp_path / "again"
    words = ["fit", "--config", config, "--trainer.default_root_dir", str(again)]
    main([*words, "--trainer.max_steps", "2"])
    main([*words, "--ckpt_path", "last"])
    ends = [torch.load(own.checkpoint(4), weights_only=True)["state_dict"] for own in (run, RunFolder(again))]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_real_pictures_are_refused_where_clips_are_trained(config, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a cat")
    words = ["--data.images", str(tmp_path / "pictures"), "--data.offline_ratio", "0.5"]
    refused(["fit", "--config", config, *words], "the policy trains on no real pictures: set it to 0", capsys)


def test_rewards_are_the_mean_over_the_chosen_frames_and_their_gradient_ends_there(case):
    policy = WanPolicy(str(case.folder), 32, 32, num_frames=9, rewarded_frames="first", num_rewarded_frames=2)
    policy.load()
    text = policy.encoder(Encoding()).text
    conditions = Conditions(["a cat"], Text.collate(text.encode(["a cat"]), text.ragged), torch.arange(1))
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


def test_a_reward_that_reads_clips_gets_the_rewarded_frames_together(case):
    policy = WanPolicy(str(case.folder), 32, 32, num_frames=9, num_rewarded_frames=3)
    policy.load()
    text = policy.encoder(Encoding()).text
    conditions = Conditions(["a cat"], Text.collate(text.encode(["a cat"]), text.ragged), torch.arange(1))
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
