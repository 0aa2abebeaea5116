"""Ranks that share samples and divide their tokens, on gloo, against one process that has them alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import srpo_lightning
from examples.my_policies import PixelFlow
from srpo_lightning.evaluation.comparison import read_table
from srpo_lightning.policies import FluxPolicy, ZImagePolicy
from srpo_lightning.policies.base import Policy
from srpo_lightning.policies.divided import check_plan, check_text
from srpo_lightning.run_folder import RunFolder
from tests import processes, tiny
from tests.families import tiny_z_image
from tests.families.cases import CASES
from tests.ranks.test_sharded import assert_close, sharded, whole
from tests.ranks.test_sharded import config as config_of_ranks

ASSETS = Path(srpo_lightning.__file__).parent / "assets"
DIVIDED = {
    "class_path": "srpo_lightning.training.strategies.ReplicatedStrategy",
    "init_args": {"context_parallel": 2},
}
SRPO = {
    "class_path": "srpo_lightning.objectives.SRPO",
    "init_args": {"control_words": {"positive": ["3d"], "negative": ["flat"]}, "num_rollout_steps": 2, "margin": 5.0},
}
LEAP_ALIGN = {"class_path": "srpo_lightning.objectives.LeapAlign", "init_args": {"num_steps": 3, "input_gradient": 1.0}}


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("flux", ["gradient_checkpointing"]),
        ("flux2_klein", []),
        ("qwen_image", ["gradient_checkpointing"]),
        ("qwen_image", ["alike"]),  # no mask, until a row is added that can be halved
        ("qwen_image", ["autocast"]),  # queries in float32 beside values in bfloat16
        ("wan", []),  # a clip, whose text every rank has whole
    ],
)
def test_velocities_and_gradients_of_weights_and_latents_are_those_of_one_process(models, tmp_path, family, words):
    folder = models.pipeline if family == "flux" else CASES[family].write(tmp_path / family)
    done = processes.start([family, str(folder), *words], 2, program="tests.ranks.divided_passes")
    assert done.returncode == 0, done.output


def builtin(run: Path, features: Path, objective: dict, ranks: int, strategy: object = "auto", **policy) -> Path:
    """Two steps of the built-in FLUX with plain gradient descent, whose change of the weights is the gradient's."""
    (run.parent / "prompts.txt").write_text("\n".join(["red apple", "blue bus", "dog", "cake", "tree"]))
    pretrained = {"pretrained": str(ASSETS / "emoji-flux"), "height": 64, "width": 64}
    settings = {
        "seed_everything": 3,
        "model": {
            "policy": {"class_path": "srpo_lightning.policies.FluxPolicy", "init_args": pretrained | policy},
            "reward": {
                "class_path": "srpo_lightning.rewards.ClipReward",
                "init_args": {"pretrained": str(ASSETS / "emoji-clip")},
            },
            "objective": objective,
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.9}},
        },
        "data": {
            "train": str(run.parent / "prompts.txt"),
            "evaluation": str(run.parent / "prompts.txt"),
            "batch_size": 2,
            "cache_dir": str(features),
        },
        "checkpoint": {"every_n_steps": 1},
        "trainer": {
            "default_root_dir": str(run),
            "max_steps": 2,
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": strategy,
            "gradient_clip_val": 0,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "srpo_lightning.callbacks.EMA", "init_args": {"decay": 0.5}}],
        },
    }
    path = run.with_suffix(".json")
    path.write_text(json.dumps(settings))
    return path


def fit(config: Path, *arguments: str) -> str:
    done = processes.start(
        ["fit", "--config", str(config), *arguments], json.loads(config.read_text())["trainer"]["devices"]
    )
    assert done.returncode == 0, done.output
    return done.output


def assert_same_steps(ours: Path, theirs: Path, before: dict[str, torch.Tensor] | None) -> None:
    """As far as rounding allows: of all weights together and of each, in shares of how far they have moved."""
    ours, theirs = whole(ours, 2), whole(theirs, 2)
    for kind in ("state_dict", "ema"):
        differences, moves = [], []
        for name, weight in theirs[kind].items():
            start = 0 if before is None else before[name.removeprefix("policy.transformer.")]
            differences.append((ours[kind][name] - weight).norm())
            moves.append((weight - start).norm())
            assert differences[-1] <= 1e-3 * moves[-1] + 1e-6, (kind, name, float(differences[-1]), float(moves[-1]))
        assert torch.stack(moves).norm() > 1e-3
        assert torch.stack(differences).norm() <= 1e-5 * torch.stack(moves).norm(), kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("context")


@pytest.fixture(scope="module")
def one(features, folder) -> Path:
    fit(builtin(folder / "one", features, SRPO, 1))
    return folder / "one"


@pytest.fixture(scope="module")
def before() -> dict[str, torch.Tensor]:
    return load_file(ASSETS / "emoji-flux" / "transformer" / "diffusion_pytorch_model.safetensors")


def test_two_ranks_that_share_every_sample_take_the_steps_of_one_resumed_between(features, folder, one, before):
    path = builtin(folder / "shared", features, SRPO, 2, DIVIDED, gradient_checkpointing=True)
    output = fit(path, "--trainer.max_steps", "1")
    assert "(ReplicatedStrategy, 32-true, 2 ranks per sample): trains" in output
    assert "steps of 2 samples" in output
    fit(path, "--ckpt_path", "last")
    assert_same_steps(folder / "shared", one, before)


def test_weights_are_divided_too_where_a_run_of_one_process_goes_on(features, folder, one, before):
    shutil.copytree(one, folder / "both")
    RunFolder(folder / "both").checkpoint(2).unlink()
    path = builtin(folder / "both", features, SRPO, 2, sharded(2, context_parallel=2))
    assert "will not be the unbroken one" not in fit(path, "--ckpt_path", "last")
    assert_same_steps(folder / "both", one, before)


def test_gradients_through_two_leaps_train_the_adapter_of_one_process(features, folder):
    """Through the second leap's input gradients go from one divided pass into the other."""
    pytest.importorskip("peft")
    for run, ranks, strategy in (("leap one", 1, "auto"), ("leap shared", 2, DIVIDED)):
        fit(builtin(folder / run, features, LEAP_ALIGN, ranks, strategy, adapter={"rank": 4}))
    assert_same_steps(folder / "leap shared", folder / "leap one", None)


def test_two_groups_of_two_ranks_have_the_samples_of_two_ranks_and_measure_each_once(models, features, folder):
    """Weights are divided over all four. Of three prompts one is drawn twice, and of policy, ema and base."""
    runs = {"alone": (1, {}), "groups": (4, {"strategy": sharded(4, context_parallel=2)})}
    for run, (ranks, trainer) in runs.items():
        path = config_of_ranks(models, features, folder / run, ranks, **trainer)
        settings = json.loads(path.read_text())
        settings["data"]["batch_size"] = 4 if ranks == 1 else 2
        settings["trainer"]["callbacks"] = tiny.config(models, folder / run, features)["trainer"]["callbacks"][:3]
        path.write_text(json.dumps(settings))
        done = processes.start(["fit", "--config", str(path)], ranks)
        assert done.returncode == 0, done.output
    alone, groups = (RunFolder(folder / run) for run in runs)
    assert_close(whole(folder / "groups", 4), whole(folder / "alone", 4))
    for weights in ("policy", "ema"):
        ours, theirs = (read_table(run.table(4, weights)) for run in (groups, alone))
        assert ours.indices.tolist() == [0, 1, 2]
        for name, column in theirs.columns.items():
            torch.testing.assert_close(ours.columns[name], column, rtol=0, atol=2e-4)
    files = [json.loads(line)["file"] for line in groups.samples.metadata.read_text().splitlines()]
    assert len(files) == len(set(files)) == 9
    saved = torch.load(groups.checkpoint(4) / "meta.pt", weights_only=True)
    assert saved["step_size"] == [2, 2, 1]


def refusal(policy: Policy, degree: int = 2, tokens: int = 16) -> str:
    with pytest.raises(ValueError, match="context_parallel is") as error:
        policy.check_divided(degree, [], {"prompt_embeds": (tokens, 16)})
    return str(error.value)


def test_what_cannot_be_divided_is_refused_in_one_line(models, tmp_path):
    flux = str(models.pipeline)
    assert "not divide the 2 attention heads" in refusal(FluxPolicy(flux, 32, 32), 4)
    assert refusal(FluxPolicy(flux, 32, 32), 4).endswith("set it to one of 1, 2")
    assert "not divide the 9 tokens of a picture of 48 x 48 pixels: choose height or width a multiple of 32" in refusal(
        FluxPolicy(flux, 48, 48)
    )
    assert "the 15 tokens of a text" in refusal(FluxPolicy(flux, 32, 32), tokens=15)
    assert refusal(FluxPolicy(flux, 32, 32), tokens=15).endswith("set data.max_sequence_length to 14 or 16")
    assert "are not compiled" in refusal(FluxPolicy(flux, 32, 32, compile=True))
    assert "rollout_cache to null" in refusal(FluxPolicy(flux, 32, 32, rollout_cache=0.1))
    assert "the attention kernel _native_math: set" in refusal(FluxPolicy(flux, 32, 32, attention="_native_math"))
    assert "PixelFlow has no method `divide`" in refusal(PixelFlow("unread"))
    z_image = ZImagePolicy(str(tiny_z_image.CASE.write(tmp_path / "z_image")), 32, 32)
    assert "diffusers has no plan by which the tokens of a ZImageTransformer2DModel" in refusal(z_image)


def test_the_class_says_how_many_heads_there_are_where_the_model_does_not():
    with pytest.raises(ValueError, match="does not divide the 24 attention heads"):
        check_plan(FluxPolicy.__new__(FluxPolicy).diffusers_class, {}, 5)


def test_a_text_shorter_than_the_group_has_a_length_to_be_filled_to():
    with pytest.raises(ValueError, match=r"set data\.max_sequence_length to 4$"):
        check_text(4, 3)


@pytest.mark.parametrize("strategy", [DIVIDED["class_path"], sharded(2)["class_path"]])
def test_groups_that_do_not_divide_the_ranks_are_refused_before_anything_is_read(features, folder, strategy):
    sizes = {"context_parallel": 3} | ({"shard_size": 2} if "Sharded" in strategy else {})
    path = builtin(folder / "uneven", features, SRPO, 2, {"class_path": strategy, "init_args": sizes})
    done = processes.start(["fit", "--config", str(path)], 2)
    assert done.returncode != 0
    assert "Traceback" not in done.output
    assert "context_parallel is 3, which does not divide the number of ranks, 2: set it to one of 1, 2" in done.output
