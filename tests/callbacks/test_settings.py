"""A run resumed under another configuration: what is said, and which learning rate is in force."""

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from srpo_lightning.callbacks import OverOptimizationGuard, RunCheckpoint
from srpo_lightning.callbacks.settings import RunSettings, differences, settings_of
from srpo_lightning.run_folder import RunFolder
from srpo_lightning.training.low_bit import AdamW8bit
from srpo_lightning.training.resuming import check_optimizer
from tests import tiny
from tests.callbacks.test_checkpoint import assert_same_run, states

LR = "model.optimizer.init_args.lr"
LENGTH = "model.lr_scheduler.init_args.T_max"


def fit(models, features, folder, max_steps, settings, lr=1e-3, scheduler=None, resume=None, callbacks=()):
    """The learning rates of the steps, as the optimizer had them, by scheduler or without."""
    rates = []

    class Module(type(tiny.new_module(models))):
        def on_before_optimizer_step(self, optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])
            super().on_before_optimizer_step(optimizer)

    module = tiny.new_module(models, optimizer=lambda params: torch.optim.AdamW(params, lr=lr), lr_scheduler=scheduler)
    module.__class__ = Module
    trainer = tiny.new_trainer(
        folder, [RunCheckpoint(1, keep=9), RunSettings(settings, settings), *callbacks], max_steps=max_steps
    )
    path = RunFolder(folder).checkpoint(resume) if resume else None
    trainer.fit(module, tiny.new_data(models, features), ckpt_path=path)
    return rates


def warm_up(steps: int):
    return lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (1 + step) / steps))


def cosine(length: int):
    return lambda optimizer: CosineAnnealingLR(optimizer, T_max=length)


@pytest.mark.parametrize(
    ("before", "now", "name"),
    [
        ((1e-3, None), (2e-3, None), LR),
        ((1e-3, cosine(4)), (1e-3, cosine(40)), LENGTH),
        ((1e-3, warm_up(4)), (4e-3, warm_up(8)), LR),
        ((1e-3, cosine(4)), (1e-3, None), "model.lr_scheduler"),
        ((1e-3, None), (1e-3, warm_up(8)), "model.lr_scheduler"),
    ],
    ids=["learning rate", "length", "warm-up", "none now", "none before"],
)
def test_after_a_resume_the_learning_rate_is_that_of_an_unbroken_run_under_the_new_configuration(
    models, features, tmp_path, before, now, name
):
    fit(models, features, tmp_path / "run", 2, {name: "old"}, *before)
    with pytest.warns(UserWarning, match=f"{name} was 'old' when the checkpoint was written, and is 'new': the conf"):
        rates = fit(models, features, tmp_path / "run", 4, {name: "new"}, *now, resume=2)
    expected = fit(models, features, tmp_path / "whole", 4, {name: "new"}, *now)
    assert rates == pytest.approx(expected[2:], rel=1e-12)


def test_how_the_optimizer_is_stepped_is_no_setting_of_its_own(models, features, tmp_path):
    """Its name begins like theirs."""
    name = "model.optimizer_in_backward"
    fit(models, features, tmp_path, 1, {name: "old"}, scheduler=cosine(9))
    with pytest.warns(UserWarning, match=f"{name} was 'old' .*: steps and records before and after do not compare"):
        fit(models, features, tmp_path, 2, {name: "new"}, scheduler=cosine(9), resume=1)


def test_what_a_guard_has_lowered_stays_lowered_by_its_factor(models, features, tmp_path):
    def guard():
        own = OverOptimizationGuard(action="lower_learning_rate", learning_rate_factor=0.5)
        own.times_lowered = 2
        return own

    fit(models, features, tmp_path, 2, {LR: 1e-3}, scheduler=cosine(9), callbacks=[guard()])
    with pytest.warns(UserWarning, match=f"{LR} was 0.001"):
        rates = fit(models, features, tmp_path, 4, {LR: 4e-3}, 4e-3, cosine(9), resume=2, callbacks=[guard()])
    expected = fit(models, features, tmp_path / "whole", 4, {LR: 4e-3}, 4e-3, cosine(9))
    assert rates == pytest.approx([rate / 4 for rate in expected[2:]], rel=1e-12)


def test_without_a_change_nothing_is_said_and_nothing_touched(models, features, tmp_path):
    settings = {LR: 1e-3, LENGTH: 9, "trainer.precision": "32-true"}
    fit(models, features, tmp_path / "a", 4, settings, scheduler=cosine(9))
    fit(models, features, tmp_path / "b", 2, settings, scheduler=cosine(9))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(models, features, tmp_path / "b", 4, settings, scheduler=cosine(9), resume=2)
    a, b = states(tmp_path / "a", 4), states(tmp_path / "b", 4)
    a["callbacks"] = b["callbacks"] = {"EMA": {"num_updates": 0}}
    a["ema"] = b["ema"] = {}
    assert_same_run(a, b)
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert a["settings"] == settings


def test_an_optimizer_of_another_class_is_refused(models, features, tmp_path):
    fit(models, features, tmp_path, 1, {})
    module = tiny.new_module(models, optimizer=lambda params: torch.optim.SGD(params, lr=1e-3))
    with pytest.raises(ValueError, match=r"SGD, which cannot go on from the states of torch.optim.adamw.AdamW"):
        tiny.new_trainer(tmp_path, max_steps=2).fit(
            module, tiny.new_data(models, features), ckpt_path=RunFolder(tmp_path).checkpoint(1)
        )


def test_the_name_that_an_optimizers_class_had_in_an_earlier_version_is_taken():
    check_optimizer("srpo_lightning.low_bit.AdamW8bit", AdamW8bit)
    with pytest.raises(ValueError, match=r"cannot go on from the states of srpo_lightning.training.low_bit.AdamW8bit"):
        check_optimizer("srpo_lightning.low_bit.AdamW8bit", torch.optim.AdamW)


def test_of_an_earlier_versions_checkpoint_only_what_differs_is_said():
    earlier = {
        "model.optimizer.class_path": "srpo_lightning.low_bit.AdamW8bit",
        "data.pretrained": "flux",
        "data.height": 32,
        "data.width": 32,
        "model.policy.init_args.pretrained": "/elsewhere/site-packages/srpo_lightning/assets/emoji-flux",
        "callbacks.RewardTracking.candidates": ["srpo_lightning/assets/prompts/eval.txt"],
    }
    now = {
        "model.optimizer.class_path": "srpo_lightning.training.low_bit.AdamW8bit",
        "model.policy.init_args.trained_guidance": "conditional",
        "model.objective.init_args.others": 0,
        "model.policy.init_args.pretrained": "builtin:emoji-flux",
        "callbacks.RewardTracking.candidates": ["builtin:prompts/eval.txt"],
    }
    assert differences(earlier, now) == []
    by_path = "srpo_lightning/assets/emoji-flux"  # as configurations of 0.1 have it, which are read as they are
    assert differences(earlier, now | {"model.policy.init_args.pretrained": by_path}) == []
    assert differences(earlier, now | {"model.objective.init_args.others": 3}) == [
        "model.objective.init_args.others was 0 when the checkpoint was written, and is 3"
    ]


def test_settings_are_plain_and_those_without_effect_are_left_out(models, tmp_path):
    found = settings_of(tiny.config(models, tmp_path / "run", tmp_path / "cache"))
    assert found["model.objective.init_args.num_rollout_steps"] == 2
    assert found["callbacks.EMA.decay"] == 0.9
    assert not any(name.startswith(("trainer.max", "data.cache", "trainer.default")) for name in found)
    assert {type(value) for value in found.values()} <= {str, int, float, bool, list, type(None)}
    other = found | {"seed_everything": 4}
    del other["callbacks.EMA.decay"]
    assert differences(found, other) == [
        "seed_everything was 3 when the checkpoint was written, and is 4",
        "callbacks.EMA.decay was 0.9 when the checkpoint was written, and is None",
    ]
