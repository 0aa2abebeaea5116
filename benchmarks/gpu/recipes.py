"""The recipes that are measured, with random weights made on the device, and the step that is made of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from benchmarks.bare_step import BareStep, load, on_device
from benchmarks.gpu.scale import Scale
from benchmarks.memory import changed
from srpo_lightning.batch import Conditions
from srpo_lightning.flow import inject
from srpo_lightning.jobs.estimate.options import POLICY
from srpo_lightning.jobs.estimate.prediction import fake_conditions
from srpo_lightning.jobs.estimate.published import local_files
from srpo_lightning.module import SRPOModule
from srpo_lightning.policies.parallel import choose_attention
from srpo_lightning.training.optimizers import is_eight_bit

LORA, QLORA, ALL = (f"configs/flux_srpo_{name}.yaml" for name in ("lora", "qlora", "1gpu"))
ASSETS = "srpo_lightning/assets"
SMALL_PX = 32

WITHOUT_AVERAGE = {"trainer.callbacks": None}
"""An average in host memory takes none of the device's."""


def objective(name: str, **settings: Any) -> dict[str, object]:
    """Another objective, its rollout as short as it can be: its length changes no peak."""
    class_path = f"srpo_lightning.objectives.{name}"
    return {"model.objective": Namespace(class_path=class_path, init_args=Namespace(**settings, reward_batch_size=1))}


CASES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "LoRA": (LORA, {}),
    "QLoRA": (QLORA, {}),
    "all weights, 8-bit states": (ALL, WITHOUT_AVERAGE),
    "all weights, stepped in the backward pass": (
        ALL,
        WITHOUT_AVERAGE
        | {
            "model.optimizer_in_backward": True,
            "trainer.accumulate_grad_batches": 1,
            "trainer.gradient_clip_val": None,
        },
    ),
    "LoRA, ReFL": (LORA, objective("ReFL", num_steps=4, late_steps=(3, 3))),
    "LoRA, DRaFT-LV": (LORA, objective("DRaFT", num_steps=4, num_variants=2)),
    "LoRA, 256 px, no gradient checkpointing": (
        LORA,
        {f"{POLICY}.gradient_checkpointing": False, f"{POLICY}.height": 256, f"{POLICY}.width": 256},
    ),
}
"""Recipes by name: the configuration that they start from, and what is changed in it."""


@contextmanager
def settings_of(case: str, scale: Scale, changes: Mapping[str, object] | None = None) -> Iterator[Namespace]:
    """The configuration of a case, with folders of small files in the place of published models.

    Args:
        case: Name of the recipe.
        scale: At `small` everything but the models and their size is the recipe's.
        changes: Further settings by dotted name.
    """
    start, own = CASES[case]
    config = changed(start, {**own, f"{POLICY}.quantize_dir": None, **(changes or {})})
    if scale.is_small:
        shrink(config)
    with local_files(config):
        yield config


def shrink(config: Namespace) -> None:
    """Put the built-in models in the place of published ones, in place.

    And torch's AdamW in the place of optimizers that compile their kernels, which the counter of a CPU does not bear.
    """
    if is_eight_bit(resolve_name(config.model.optimizer.class_path)):
        config.model.optimizer = Namespace(class_path="torch.optim.AdamW", init_args=Namespace(lr=5e-6))
    config[f"{POLICY}.pretrained"] = f"{ASSETS}/emoji-flux"
    config[f"{POLICY}.height"] = config[f"{POLICY}.width"] = SMALL_PX
    config.model.reward = built_in_reward()
    if "num_rollout_steps" in config.model.objective.init_args:
        config.model.objective.init_args.num_rollout_steps = 2


def built_in_reward() -> Namespace:
    """The one that comes with the package."""
    return Namespace(
        class_path="srpo_lightning.rewards.ClipReward", init_args=Namespace(pretrained=f"{ASSETS}/emoji-clip")
    )


def new_module(config: Namespace, scale: Scale) -> SRPOModule:
    """The configured module with random weights, made on the device."""
    return load(config, scale.torch_device, "flux")


@contextmanager
def attention_kernel(module: SRPOModule, name: str) -> Iterator[None]:
    """Attention by a kernel of diffusers, then by torch's choice again."""
    policy: Any = module.policy
    choose_attention(policy.transformer, name)
    try:
        yield
    finally:
        choose_attention(policy.transformer, "native")


def new_step(module: SRPOModule, config: Namespace) -> BareStep:
    """A step as the recipe's accumulation leaves it: with the gradients of the micro-batch before."""
    step = BareStep(module, config, new_conditions(module, config), module.configure_optimizers())
    step.accumulates = config.trainer.accumulate_grad_batches > 1
    return step


def new_conditions(module: SRPOModule, config: Namespace, batch_size: int | None = None) -> Conditions:
    """A batch with text features that are no zeros, with which products of matrices would be faster; always the same.

    Args:
        module: Module whose policy is asked for the features' shapes.
        config: Configuration of the data.
        batch_size: Number of prompts; None: that of the configuration.
    """
    conditions = fake_conditions(config, module.policy, batch_size or config.data.batch_size)
    generator = torch.Generator().manual_seed(0)

    def draw(features: Tensor) -> Tensor:
        return torch.randn(features.shape, generator=generator).to(features.dtype)

    none = conditions.unconditional
    conditions = conditions._replace(
        text=conditions.text.each(draw), unconditional=None if none is None else none.each(draw)
    )
    return on_device(conditions, module.device)


def fresh_inputs(module: SRPOModule, conditions: Conditions, batch_size: int) -> tuple[Tensor, Tensor, Conditions]:
    """Latents at random levels of noise, the levels, and as many conditions."""
    shape = (batch_size, *module.policy.latent_shape(conditions.size))
    x0, noise = torch.randn(shape, device=module.device), torch.randn(shape, device=module.device)
    sigma = torch.rand(batch_size, device=module.device) * 0.8 + 0.1
    return inject(x0, noise, sigma), sigma, conditions.take(slice(1)).repeat(batch_size)
