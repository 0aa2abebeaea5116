"""What a rollout costs, and what saves it: a kept rollout, a cache of features, fewer guided steps."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jsonargparse import Namespace

from benchmarks.gpu.passes import seconds_of
from benchmarks.gpu.recipes import ASSETS, CASES, SMALL_PX, built_in_reward, new_conditions, new_module, settings_of
from benchmarks.gpu.scale import Scale
from benchmarks.memory import changed
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.jobs.estimate.options import POLICY
from srpo_lightning.jobs.estimate.published import local_files
from srpo_lightning.module import SRPOModule
from srpo_lightning.objectives.base import Rollout
from srpo_lightning.policies.guided import SparseGuidance

REPEATS = 2
UPDATES = (1, 2, 4)

CACHES: Mapping[str, float | None] = {"no cache": None, "a cache that never serves": 1e-9, "one that always does": 1e9}
"""Thresholds. Between the two ends lies what a trained model saves; random weights say nothing of that."""

GUIDED: Mapping[str, SparseGuidance] = {
    "at every step": SparseGuidance(),
    "guidance_every 2": SparseGuidance(2),
    "guidance_every 4": SparseGuidance(4),
    "guided_steps 10": SparseGuidance(first=10),
    "at no step": SparseGuidance(first=0),
}

GUIDED_FAMILY = "configs/families/sd35_medium.yaml"
"""A family whose guidance takes a second pass, small enough to be made in a moment."""


def roll_out(module: SRPOModule, conditions: Conditions) -> Rollout:
    """As `fit` does."""
    with torch.autocast(module.device.type, torch.bfloat16), module.policy.rolling_out():
        return module.objective.rollout(module.policy, conditions, Draws(0))


def update(module: SRPOModule, conditions: Conditions, rollout: Rollout) -> None:
    """Loss and backward pass of a micro-batch."""
    with torch.autocast(module.device.type, torch.bfloat16):
        loss = module.objective.loss(module.policy, module.reward, conditions, rollout, Draws(0)).loss
    loss.backward()
    module.zero_grad()


def steps(module: SRPOModule, conditions: Conditions, count: int) -> None:
    """So many training steps on one rollout."""
    rollout = roll_out(module, conditions)
    for turn in range(count):
        update(module, conditions, rollout._replace(turn=(turn, count)))


def rollouts(scale: Scale) -> dict[str, Any]:
    """Seconds per training step with so many of them on each rollout, and of rollouts with a cache; LoRA recipe."""
    with settings_of("LoRA", scale) as config:
        module = new_module(config, scale)
        conditions = new_conditions(module, config)
        kept: dict[str, Any] = {}
        for count in UPDATES:
            seconds = seconds_of(partial(steps, module, conditions, count), module.device, REPEATS)
            kept[f"updates_per_rollout {count}"] = {"seconds per training step": seconds / count}
        cached: dict[str, Any] = {}
        policy: Any = module.policy
        for name, policy.rollout_cache in CACHES.items():
            cached[name] = {"seconds": seconds_of(partial(roll_out, module, conditions), module.device, REPEATS)}
    return {"kept rollouts": kept, "rollout_cache": cached}


def guided_configuration(scale: Scale) -> Namespace:
    """The LoRA recipe on a family that is guided by a second pass."""
    if not scale.is_small:
        return changed(CASES["LoRA"][0], {}, GUIDED_FAMILY)
    policy = {
        "model.policy.class_path": "benchmarks.guidance.TwoPasses",
        f"{POLICY}.pretrained": f"{ASSETS}/emoji-flux",
        f"{POLICY}.height": SMALL_PX,
        f"{POLICY}.width": SMALL_PX,
        "model.reward": built_in_reward(),
        "model.objective.init_args.num_rollout_steps": 4,
        "model.objective.init_args.rollout_guidance": 4.5,
    }
    return changed(CASES["LoRA"][0], policy)


def guidance(scale: Scale) -> dict[str, Any]:
    """Seconds of a rollout by which of its steps are guided, and of an update with and without the second pass."""
    config = guided_configuration(scale)
    with local_files(config):
        module = new_module(config, scale)
        conditions = new_conditions(module, config)
        found: dict[str, Any] = {}
        policy: Any = module.policy
        for name, policy.sparse_guidance in GUIDED.items():
            found[name] = {"seconds": seconds_of(partial(roll_out, module, conditions), module.device, REPEATS)}
        rollout = roll_out(module, conditions)
        trained: dict[str, Any] = {}
        for name in ("conditional", "detached"):
            policy.trained_guidance = name
            run = partial(update, module, conditions, rollout)
            trained[f"trained_guidance {name}"] = {"seconds": seconds_of(run, module.device, REPEATS)}
    return {"rollouts": found, "updates": trained, "policy": type(policy).__name__}
