"""Every objective trains a FLUX through the Trainer."""

import pytest
import torch

from srpo_lightning.draws import Draws
from srpo_lightning.objectives import (
    GRPO,
    ControlWords,
    DirectAlign,
    DRaFT,
    DRTune,
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    FlowDiffusion,
    LeapAlign,
    ReFL,
    Relative,
)
from srpo_lightning.policies import FluxPolicy
from tests import tiny

FORM = Relative(ControlWords(["x", "y"], ["z"]))
OBJECTIVES = {
    "direct-align": DirectAlign(num_rollout_steps=2),
    "refl": ReFL(num_steps=3, late_steps=(1, 2)),
    "draft-2": DRaFT(num_steps=3, num_trained_steps=2),
    "draft-lv": DRaFT(num_steps=3, num_variants=2),
    "drtune": DRTune(num_steps=5, num_trained_steps=2),
    "leap": LeapAlign(num_steps=3),
    "sparse": FlowBPSparse(num_steps=3, num_trained_steps=2),
    "bridge": FlowBPBridge(num_steps=3, num_trained_steps=2),
    "lagrange": FlowBPLagrange(FORM, num_steps=4),
    "dance": GRPO(num_steps=4, group_size=3),
    "flow": GRPO(FORM, diffusion=FlowDiffusion(), num_steps=4, group_size=3),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_two_steps_through_the_trainer_change_the_weights(models, features, tmp_path, objective):
    module = tiny.new_module(models)
    module.objective = objective
    module.configure_model()
    before = {name: p.clone() for name, p in module.trainable_parameters()}
    tiny.new_trainer(tmp_path, max_steps=2).fit(module, tiny.new_data(models, features))
    assert module.skipping.num_in_a_row == 0
    changed = [name for name, p in module.trainable_parameters() if not torch.equal(p, before[name])]
    assert len(changed) > 20
    assert torch.isfinite(module.trainer.callback_metrics["train/loss"])


def test_gradient_checkpointing_inside_the_policy_changes_no_gradient_of_a_checkpointed_chain(models):
    conditions, gradients = tiny.new_conditions(1), []
    for checkpointing in (False, True):
        policy = FluxPolicy(str(models.pipeline), 32, 32, gradient_checkpointing=checkpointing)
        policy.load()
        policy.train()
        objective = OBJECTIVES["draft-2"]
        rollout = objective.rollout(policy, conditions, Draws(0))
        objective.loss(policy, tiny.new_reward(models.clip), conditions, rollout, Draws(0)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.transformer.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
