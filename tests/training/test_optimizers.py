"""Optimizers chosen by class path, stepping in the backward pass, and precisions, in whole runs on the tiny models."""

import json
import math
import os
from pathlib import Path
from unittest import mock

import bitsandbytes
import pytest
import torch
import torchao.optim
from lightning.pytorch import Callback

from srpo_lightning.callbacks import EMA, RunCheckpoint
from srpo_lightning.cli import main
from srpo_lightning.files.checkpoints import gathered
from srpo_lightning.policies import FluxPolicy
from srpo_lightning.run_folder import RunFolder
from srpo_lightning.training.low_bit import AdamW8bit
from srpo_lightning.training.optimizers import InBackward
from tests import processes, tiny
from tests.faults import History, NanReward

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torchao, which its steps compile
]


@pytest.fixture(scope="module")
def wide(models, tmp_path_factory) -> tiny.Models:
    """Most of its parameters have the 4096 numbers from which states are kept in eight bits."""
    return models._replace(pipeline=tiny.write_pipeline(tmp_path_factory.mktemp("wide") / "flux", width=64))


@pytest.fixture(autouse=True)
def _uncompiled():
    """torchao compiles its step for each shape, for minutes; the same step runs as it is written."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def write(models, features, run: Path, model: dict, dtype: str = "float32", **trainer) -> str:
    settings = tiny.config(models, run, features)
    settings["model"]["policy"]["init_args"]["dtype"] = dtype
    settings["model"] |= model
    settings["trainer"] |= {"callbacks": [], "limit_val_batches": 0, "num_sanity_val_steps": 0} | trainer
    path = run.with_suffix(".yaml")
    path.write_text(json.dumps(settings))
    return str(path)


def saved(run: Path, step: int) -> dict:
    return torch.load(RunFolder(run).checkpoint(step), weights_only=True, map_location="cpu")


def numbers(state: dict) -> list[torch.Tensor]:
    """The plain tensors that an optimizer's state is made of, by parameter and name."""
    found = []
    for _, value in sorted(state.items()):
        if isinstance(value, dict):
            found += numbers(value)
        elif hasattr(value, "codes"):
            found += [value.codes, value.scale, value.qmap]
        elif isinstance(value, torch.Tensor):
            found.append(value)
    return found


def assert_same(one: dict, other: dict) -> None:
    """Two checkpoints, weights and optimizer states, bit for bit."""
    states = [numbers(checkpoint["optimizer_states"][0]["state"]) for checkpoint in (one, other)]
    pairs = [(t, other["state_dict"][name]) for name, t in one["state_dict"].items()]
    pairs += zip(*states, strict=True)
    assert len(pairs) > 100
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


CHOICES = {
    "fused": ("torch.optim.AdamW", {"fused": True}),
    "bitsandbytes": ("bitsandbytes.optim.AdamW8bit", {}),
    "paged": ("bitsandbytes.optim.PagedAdamW8bit", {}),
    "torchao": ("torchao.optim.AdamW8bit", {}),
    "stochastic": ("torchao.optim.AdamW8bit", {"bf16_stochastic_round": True}),
    "ours": ("srpo_lightning.training.low_bit.AdamW8bit", {"bf16_stochastic_round": True}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_an_optimizer_by_class_path_resumes_bit_for_bit(wide, features, tmp_path, choice):
    """With the trainer's clipping, a schedule that changes the learning rate, and bfloat16 weights where they round."""
    class_path, arguments = CHOICES[choice]
    model = {
        "optimizer": {"class_path": class_path, "init_args": {"lr": 1e-3} | arguments},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}},
    }
    dtype = "bfloat16" if "bf16_stochastic_round" in arguments else "float32"
    whole = write(wide, features, tmp_path / "whole", model, dtype, precision="bf16-mixed")
    parted = write(wide, features, tmp_path / "parted", model, dtype, precision="bf16-mixed")
    main(["fit", "--config", whole])
    main(["fit", "--config", parted, "--trainer.max_steps", "2"])
    torch.manual_seed(0)
    main(["fit", "--config", parted, "--ckpt_path", "last"])
    final = saved(tmp_path / "whole", 4)
    assert_same(final, saved(tmp_path / "parted", 4))
    assert float(final["optimizer_states"][0]["param_groups"][0]["lr"]) == pytest.approx(1e-3 / 16)
    before = saved(tmp_path / "whole", 2)["state_dict"]
    assert sum(not torch.equal(t, before[name]) for name, t in final["state_dict"].items()) > 40


@pytest.mark.parametrize("optimizer", [bitsandbytes.optim.AdamW8bit, torchao.optim.AdamW8bit, AdamW8bit])
def test_eight_bit_states_take_a_quarter_of_the_memory_and_small_parameters_keep_float32(optimizer):
    """Two bytes and two scales of four for 256 numbers, and two tables of 256 numbers."""
    large, small = (torch.nn.Parameter(torch.zeros(n)) for n in (256 * 1024, 4095))
    steps = optimizer([large, small], lr=1e-3)
    large.grad, small.grad = torch.ones_like(large), torch.ones_like(small)
    steps.step()
    sizes = [sum(t.nbytes for t in numbers(steps.state[p]) if t.ndim) for p in (large, small)]
    assert sizes[0] == 2 * large.numel() + 2 * 4 * large.numel() // 256 + 2 * 4 * 256
    assert sizes[1] == 8 * small.numel()


def test_stochastic_rounding_moves_bfloat16_weights_by_what_rounding_to_nearest_loses():
    """A learning rate of 1e-5 is a hundredth of the distance between neighbours at 0.1: the mean follows it anyhow."""

    def moved(**arguments) -> float:
        weight = torch.nn.Parameter(torch.full((8192,), 0.1, dtype=torch.bfloat16))
        start = weight.detach().double().mean()
        steps = AdamW8bit([weight], lr=1e-5, weight_decay=0, **arguments)
        torch.manual_seed(0)
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            steps.step()
        return float(start - weight.detach().double().mean())

    assert moved() == 0
    assert moved(bf16_stochastic_round=True) == pytest.approx(20e-5, rel=0.2)


SHARDED = {"class_path": "srpo_lightning.training.strategies.ShardedStrategy", "init_args": {"shard_size": 1}}
IN_BACKWARD = {"optimizer_in_backward": True}


@pytest.mark.parametrize(
    ("model", "dtype", "trainer", "cure"),
    [
        ({"optimizer": {"class_path": "bitsandbytes.optim.AdamW8bit"}}, "float32", {"strategy": SHARDED},
         "AdamW8bit of bitsandbytes cannot step .* to srpo_lightning.training.low_bit.AdamW8bit"),
        ({"optimizer": {"class_path": "torchao.optim.AdamW8bit"}}, "bfloat16",
         {"strategy": SHARDED, "precision": "bf16-mixed"}, "of torchao cannot step bfloat16 .* training.low_bit"),
        (IN_BACKWARD, "float32", {}, "set trainer.gradient_clip_val to 0; model.clip_norm_per_parameter clips each"),
        (IN_BACKWARD, "float32", {"gradient_clip_val": 0, "accumulate_grad_batches": 2}, "grad_batches to 1 and raise"),
        (IN_BACKWARD, "float32", {"gradient_clip_val": 0, "strategy": "ddp"}, "ReplicatedStrategy .* on one device"),
        ({"clip_norm_per_parameter": 1.0}, "float32", {}, "belongs to model.optimizer_in_backward: set that to true"),
        ({}, "float32", {"precision": "bf16-true"}, "set trainer.precision to bf16-mixed or 32-true"),
        ({}, "bfloat16", {"precision": "32-true"}, "to bf16-mixed, or model.policy.init_args.dtype to float32"),
        ({}, "bfloat16", {"precision": "bf16-true"}, "to bf16-mixed, or model.policy.init_args.dtype to float32"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_anything_is_read(models, tmp_path, model, dtype, trainer, cure):
    config = write(models, tmp_path / "features", tmp_path / "run", model, dtype, **trainer)
    # Lightning's launcher tells processes to come, by their environment, that they were launched.
    with mock.patch.dict(os.environ), pytest.raises(SystemExit, match=cure):
        main(["fit", "--config", config])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.yaml"]


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "32-true"), ("float32", "bf16-mixed"), ("bfloat16", "bf16-mixed")]
)
def test_the_other_precisions_train_validate_and_resume_bit_for_bit(models, features, tmp_path, dtype, precision):
    def fit(folder: str, steps: int, path: Path | None = None) -> None:
        module = tiny.new_module(models)
        module.policy = FluxPolicy(str(models.pipeline), 32, 32, dtype=dtype)
        evaluation = {"limit_val_batches": 1, "val_check_interval": 2}
        callbacks = [RunCheckpoint(2), EMA()]
        trainer = tiny.new_trainer(tmp_path / folder, callbacks, max_steps=steps, precision=precision, **evaluation)
        trainer.fit(module, tiny.new_data(models, features), ckpt_path=path)

    fit("whole", 4)
    fit("parted", 2)
    fit("parted", 4, RunFolder(tmp_path / "parted").checkpoint(2))
    final = saved(tmp_path / "whole", 4)
    assert_same(final, saved(tmp_path / "parted", 4))
    assert {t.dtype for t in final["state_dict"].values()} == {getattr(torch, dtype)}


def run(models, features, folder: Path, callbacks=(), reward=None, trainer=(), path=None, **model):
    """Four steps without clipping and their checkpoint."""
    settings = {"max_steps": 4, "gradient_clip_val": 0, "precision": "bf16-mixed"} | dict(trainer)
    fitted = tiny.new_trainer(folder, [RunCheckpoint(1, keep=9), *callbacks], **settings)
    module = tiny.new_module(models, reward, **model)
    module.policy.gradient_checkpointing = True
    fitted.fit(module, tiny.new_data(models, features), ckpt_path=path)
    return fitted, module


def halving(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, bitsandbytes.optim.AdamW8bit, torchao.optim.AdamW8bit])
def test_stepping_in_the_backward_pass_changes_no_bit(wide, features, tmp_path, optimizer):
    """Nor where a run goes on with it that was begun without it."""
    model = {"optimizer": lambda params: optimizer(params, lr=1e-3), "lr_scheduler": halving}
    after, during = EMA(decay=0.9), EMA(decay=0.9)
    run(wide, features, tmp_path / "after", [after], **model)
    trainer, module = run(wide, features, tmp_path / "during", [during], **model, **IN_BACKWARD)
    path = RunFolder(tmp_path / "after").checkpoint(2)
    run(wide, features, tmp_path / "resumed", [EMA(decay=0.9)], path=path, **model, **IN_BACKWARD)
    assert (trainer.global_step, module.micro_step, during.num_updates) == (4, 4, 4)
    final = saved(tmp_path / "after", 4)
    for other in ("during", "resumed"):
        assert_same(final, saved(tmp_path / other, 4))
    assert all(torch.equal(average, during.weights[name]) for name, average in after.weights.items())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3 / 16


def test_there_is_never_more_than_one_parameters_gradient(wide, features, tmp_path):
    """Bytes of all gradients whenever one more is there: the whole model's without, the largest parameter's with."""

    def gradients(**model) -> tuple[int, list[int]]:
        module, bytes_then = tiny.new_module(wide, **model), []
        module.configure_model()
        parameters = [p for _, p in module.trainable_parameters()]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda _: bytes_then.append(sum(p.grad.nbytes for p in parameters if p.grad is not None))
            )
        trainer = tiny.new_trainer(tmp_path, max_steps=2, gradient_clip_val=0)
        trainer.fit(module, tiny.new_data(wide, features))
        return max(bytes_then), [p.nbytes for p in parameters]

    whole, sizes = gradients()
    assert whole == sum(sizes)
    assert gradients(**IN_BACKWARD)[0] == max(sizes) < whole / 10


class Masked(Callback):
    """One parameter's gradient stays finite where the loss is not."""

    def on_fit_start(self, trainer, pl_module):
        _, parameter = next(pl_module.trainable_parameters())
        parameter.register_hook(torch.nan_to_num)


def test_a_loss_that_is_not_finite_skips_the_step_of_every_parameter(models, features, tmp_path):
    history, reward = History(), NanReward(str(models.clip), bad=[1])
    trainer, _ = run(models, features, tmp_path, [history, Masked()], reward, **IN_BACKWARD)
    after = history.weights
    assert all(torch.equal(p, after[1][name]) for name, p in after[0].items())
    assert any(not torch.equal(p, after[2][name]) for name, p in after[1].items())
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {3}


def test_losses_that_are_never_finite_stop_the_run(models, features, tmp_path):
    reward = NanReward(str(models.clip), bad=[1, 2])
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        run(models, features, tmp_path, (), reward, **IN_BACKWARD, max_skipped_steps=1)


class Overflow(Callback):
    """One parameter's gradient is infinite in the second step, of a finite loss."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        name, parameter = next(pl_module.trainable_parameters())
        if batch_idx == 1:
            self.name, self.hook = name, parameter.register_hook(lambda gradient: gradient * math.inf)
        if batch_idx == 2:
            self.hook.remove()


def test_a_gradient_that_is_not_finite_leaves_its_own_parameter_alone(models, features, tmp_path):
    history, overflow = History(), Overflow()
    run(models, features, tmp_path, [overflow, history], **IN_BACKWARD)
    after = history.weights
    assert torch.equal(after[0][overflow.name], after[1][overflow.name])
    assert sum(not torch.equal(p, after[1][name]) for name, p in after[0].items()) > 20
    assert all(p.isfinite().all() for p in after[3].values())


def test_each_parameter_is_clipped_to_a_norm_of_its_own_and_the_whole_norm_is_told():
    """Gradients of norm 5 and 0.5 under a limit of 1; SGD shows them."""
    large, little = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    stepper = InBackward(clip_norm=1.0)
    stepper.attach(torch.optim.SGD([large, little], lr=1.0))
    (large @ torch.tensor([3.0, 4.0]) + little @ torch.tensor([0.3, 0.4])).backward()
    torch.testing.assert_close(large.detach(), torch.tensor([-0.6, -0.8]), rtol=0, atol=1e-6)
    torch.testing.assert_close(little.detach(), torch.tensor([-0.3, -0.4]))
    assert large.grad is None
    assert float(stepper.take_norm()) == pytest.approx(math.hypot(5, 0.5))
    assert stepper.take_norm().isnan()


def test_a_second_fit_steps_once(models, features, tmp_path):
    """The first fit's hooks are gone."""
    module = tiny.new_module(models, **IN_BACKWARD)
    for _ in range(2):
        trainer = tiny.new_trainer(tmp_path, max_steps=2, gradient_clip_val=0)
        trainer.fit(module, tiny.new_data(models, features))
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {2}


def uncompiled() -> None:
    """torchao compiles its steps; here that would take longer than all else."""
    torch.compiler.set_stance("force_eager")


class NanOnOneRank(NanReward):
    """Not a number on rank 1 in the second step."""

    def __init__(self, pretrained: str) -> None:
        super().__init__(pretrained, [1] if os.environ.get("LOCAL_RANK") == "1" else [])


def test_two_ranks_step_their_shards_in_the_backward_pass_and_skip_what_is_not_finite_on_one(wide, features, tmp_path):
    """The same weights, in bfloat16 with eight-bit states, as those of a step after the backward pass."""
    strategy = {"class_path": "srpo_lightning.training.strategies.ShardedStrategy", "init_args": {"shard_size": 2}}
    model = {
        "reward": {
            "class_path": "tests.training.test_optimizers.NanOnOneRank",
            "init_args": {"pretrained": str(wide.clip)},
        },
        "optimizer": {"class_path": "srpo_lightning.training.low_bit.AdamW8bit", "init_args": {"lr": 1e-3}},
    }
    trainer = {"devices": 2, "strategy": strategy, "precision": "bf16-mixed", "gradient_clip_val": 0, "max_steps": 3}
    configs = [
        write(wide, features, tmp_path / name, model | choice, "bfloat16", **trainer)
        for name, choice in (("after", {}), ("during", IN_BACKWARD))
    ]
    for config in configs:
        done = processes.start(["fit", "--config", config], num_ranks=2, before=uncompiled)
        assert done.returncode == 0, done.output
    after, during = (gathered(RunFolder(tmp_path / name).checkpoint(3)) for name in ("after", "during"))
    assert_same(after, during)
    assert {float(state["step"]) for state in during["optimizer_states"][0]["state"].values()} == {2.0}
