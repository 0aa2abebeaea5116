"""The examples of a reward, an objective and a policy of one's own run, also by the command line."""

import runpy
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from srpo_lightning.batch import Conditions
from srpo_lightning.cli import main
from srpo_lightning.draws import Draws
from srpo_lightning.files.quiet import QUIET
from srpo_lightning.module import SRPOModule
from srpo_lightning.objectives import SRPO, ControlWords
from srpo_lightning.rewards import Reward
from srpo_lightning.run_folder import RunFolder
from tests import tiny

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(file: str, name: str) -> type:
    return runpy.run_path(str(EXAMPLES / file))[name]


class Warmth(Reward):
    """Red less blue."""

    def forward(self, images, texts):
        return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def test_the_reward_example_prefers_the_named_colour_and_sends_gradient_to_the_pixels():
    reward = example("my_rewards.py", "NamedColour")()
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0], images[1, 2] = 1, 1
    images.requires_grad_()
    scores = reward(images, ["red. a cat", "red. a cat"])
    assert scores[0] > scores[1]
    relative = reward.contrast(images, [["red. a"] * 2, ["blue. a"] * 2], torch.tensor([[1.0, -1.0]] * 2))
    (gradient,) = torch.autograd.grad(relative.sum(), images)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 2] < 0).all()


def rewards_while_training(policy, objective, conditions: Conditions, num_steps: int) -> list[float]:
    """The mean score of the same samples before and after some steps."""
    module = SRPOModule(policy, Warmth(), objective, num_sample_steps=20)
    module.configure_model()
    optimizer = torch.optim.Adam([p for _, p in module.trainable_parameters()], lr=1e-2)
    found = []
    for steps in (0, num_steps):
        for step in range(steps):
            draws = Draws(0, step)
            rollout = objective.rollout(policy, conditions, draws)
            optimizer.zero_grad()
            objective.loss(policy, module.reward, conditions, rollout, draws).loss.backward()
            optimizer.step()
        images = module.sample(conditions)
        found.append(float(objective.score(module.reward, images, conditions.prompts).mean()))
    return found


@pytest.fixture
def pixels():
    torch.manual_seed(0)
    return example("my_policies.py", "PixelFlow")("")


def test_the_objective_example_trains_the_policy_example_towards_its_reward(pixels):
    objective = example("my_objectives.py", "LateReward")()
    before, after = rewards_while_training(pixels, objective, tiny.new_conditions(4), 10)
    assert after > before + 0.1


def test_the_policy_example_samples_trains_with_srpo_and_starts_anew(pixels):
    class Named(Warmth):
        def forward(self, images, texts):
            return super().forward(images, texts) * torch.tensor([1.0 if "red" in text else -1.0 for text in texts])

    objective = SRPO(ControlWords(["red"], ["blue"]), num_rollout_steps=4, margin=5.0)
    module = SRPOModule(pixels, Named(), objective, num_sample_steps=2)
    module.configure_model()
    conditions, draws = tiny.new_conditions(2), Draws(0)
    assert module.sample(conditions).shape == (2, 3, 8, 8)
    first = [p.detach().clone() for _, p in module.trainable_parameters()]
    rollout = objective.rollout(pixels, conditions, draws)
    objective.loss(pixels, module.reward, conditions, rollout, draws).loss.backward()
    with torch.no_grad():
        for _, parameter in module.trainable_parameters():
            assert parameter.grad.abs().sum() > 0
            parameter -= parameter.grad
    pixels.restart()
    assert all(torch.equal(p, own) for (_, p), own in zip(module.trainable_parameters(), first, strict=True))


@pytest.fixture
def command_line(models, tmp_path, monkeypatch) -> list[str]:
    """What follows a command: examples/my.yaml on the tiny pipeline's text encoders."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    text = (EXAMPLES / "my.yaml").read_text()
    for old, new in {
        "builtin:emoji-flux": models.pipeline,
        "builtin:prompts/eval.txt": models.train,
        "runs/my": tmp_path / "run",
    }.items():
        assert old in text, old
        text = text.replace(old, str(new))
    (config := tmp_path / "my.yaml").write_text(text)
    return ["--config", str(config)]


@pytest.mark.parametrize("objective", ["srpo_lightning.objectives.SRPO", "my_objectives.LateReward"])
def test_the_examples_train_by_class_path(command_line, features, tmp_path, objective):
    flags = ["--data.cache_dir", str(features), "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    if "Late" in objective:
        flags += ["--model.objective", objective]
    main(["fit", *command_line, *flags])
    assert len(RunFolder(tmp_path / "run").checkpoints()) == 1
    assert len(list((tmp_path / "run" / "samples").rglob("*.png"))) > 0


def test_the_examples_are_estimated_and_cached_by_class_path(command_line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where features are kept
    main(["estimate", *command_line])
    assert "fits a device of" in capsys.readouterr().out
    main(["cache", *command_line])
    assert list(tmp_path.rglob("*.parquet"))


def test_a_policy_without_an_encoder_is_refused(command_line, tmp_path, monkeypatch):
    code = (EXAMPLES / "my_policies.py").read_text()
    assert "def encoder(" in code
    (tmp_path / "bare_policies.py").write_text(code.replace("def encoder(", "def another("))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Path(command_line[1])
    settings = yaml.safe_load(config.read_text())
    settings["model"]["policy"]["class_path"] = "bare_policies.PixelFlow"
    config.write_text(yaml.safe_dump(settings))
    for command in ("fit", "estimate", "cache"):
        with pytest.raises(SystemExit, match=r"PixelFlow has no method `encoder`, .*: give it one"):
            main([command, *command_line])


def test_the_script_trains_without_the_command_line_and_goes_on(models, features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (EXAMPLES / "train.py").read_text()
    for old, new in {
        'with_builtin("builtin:emoji-flux")': repr(str(models.pipeline)),
        'with_builtin("builtin:emoji-clip")': repr(str(models.clip)),
        'with_builtin("builtin:prompts/train.txt")': repr(str(models.train)),
        'with_builtin("builtin:prompts/eval.txt")': repr(str(models.evaluation)),
        "height=64, width=64": "height=32, width=32",
        "batch_size=4": f"batch_size=4, cache_dir={str(features)!r}",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "first.py").write_text(text.replace("max_steps=8", "max_steps=4"))
    (tmp_path / "whole.py").write_text(text)
    run = RunFolder("runs/library")
    run_script(tmp_path / "first.py")
    assert [path.name for path in run.checkpoints()] == ["step-00000004.ckpt"]
    resumed = run_script(tmp_path / "whole.py")["trainer"]
    assert resumed.global_step == 8
    assert resumed.gradient_clip_val == 0.1
    assert [path.name for path in run.checkpoints()] == ["step-00000004.ckpt", "step-00000008.ckpt"]
    assert {int(path.parts[-3].removeprefix("step-")) for path in run.samples.pictures()} == {0, 4, 8}
    assert list(run.logs.glob("events.*"))


def run_script(path: Path) -> dict:
    """What a script leaves, with the warnings of Lightning and torch that the command line keeps quiet."""
    with warnings.catch_warnings():
        for message in QUIET:
            warnings.filterwarnings("ignore", message)
        return runpy.run_path(str(path))
