"""One training step, and how far two of them are from each other."""

from typing import NamedTuple

import torch
from jsonargparse import Namespace
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from benchmarks.gpu.recipes import attention_kernel, new_conditions
from benchmarks.optimizers import distance
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import keyed_generator
from srpo_lightning.jobs.estimate.step import micro_batch
from srpo_lightning.module import SRPOModule

NUMBERS = ("loss", "gradient", "update", "transformer alone", "worst tensor")
"""What is compared, in the order of tables."""

LEAST_SHARE = 1e-2
"""Tensors whose gradient has a smaller share of the norm of all are not looked at one by one."""


class Step(NamedTuple):
    """What a step has computed, on the CPU in float32.

    Args:
        loss: Loss.
        gradients: Gradients by the names of the parameters.
        updates: What the optimizer has added to the parameters, likewise.
        alone: Gradients of the transformer alone, likewise: from given latents, of a given sum of its velocity. The
            rounding of rollout, decoder and reward is not in them.
    """

    loss: float
    gradients: dict[str, Tensor]
    updates: dict[str, Tensor]
    alone: dict[str, Tensor]


def start_adapters(module: SRPOModule) -> None:
    """Give adapters that change nothing yet, whose first half has no gradient, small weights, always the same."""
    for name, parameter in module.trainable_parameters():
        if "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=keyed_generator(0, name))
            parameter.data.copy_(0.02 * drawn)


def make_step(module: SRPOModule, config: Namespace, attention: str = "native") -> Step:
    """Rollout, loss, backward pass and optimizer step from the same seed and the same features, on the module's device.

    Args:
        module: Module whose models are loaded.
        config: Configuration that it was made of.
        attention: Attention kernel by diffusers' name; native is torch's choice.
    """
    start_adapters(module)
    conditions = new_conditions(module, config)
    with attention_kernel(module, attention):
        alone = transformer_gradients(module, config, conditions)
        loss = accumulate(module, config, conditions)
    return finish_step(module, module.configure_optimizers(), loss)._replace(alone=alone)


def transformer_gradients(module: SRPOModule, config: Namespace, conditions: Conditions) -> dict[str, Tensor]:
    """Of the sum of a velocity times drawn numbers, in the trained parameters; no gradient is left behind."""
    shape = (conditions.batch_size, *module.policy.latent_shape(conditions.size))
    x, upstream = (torch.randn(shape, generator=keyed_generator(0, name)).to(module.device) for name in ("x", "v"))
    sigma = torch.full((len(x),), 0.7, device=module.device)
    with torch.autocast(module.device.type, torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
        velocity = module.policy(x, sigma, conditions, 3.5)
    (velocity * upstream).sum().backward()
    found = gradients_of(module)
    module.zero_grad()
    return found


def gradients_of(module: SRPOModule) -> dict[str, Tensor]:
    """What there is of them by name."""
    return {name: on_cpu(p.grad) for name, p in module.trainable_parameters() if p.grad is not None}


def accumulate(module: SRPOModule, config: Namespace, conditions: Conditions) -> float:
    """Add the gradients of a micro-batch, and give its loss."""
    loss = micro_batch(module, conditions, config.trainer.precision)
    loss.backward()
    return float(loss.detach())


def finish_step(module: SRPOModule, optimizer: Optimizer, loss: float) -> Step:
    """Step the optimizer, and keep what has changed."""
    parameters = dict(module.trainable_parameters())
    before = {name: on_cpu(parameter) for name, parameter in parameters.items()}
    gradients = gradients_of(module)
    optimizer.step()
    return Step(loss, gradients, {name: on_cpu(p) - before[name] for name, p in parameters.items()}, {})


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy in float32; of what ranks divide, this rank's part."""
    own = tensor.detach()
    return (own.to_local() if isinstance(own, DTensor) else own).to("cpu", torch.float32, copy=True)


def differences(own: Step, reference: Step) -> dict[str, float]:
    """How far a step is from another, each over the size of the latter; NaN of what is not finite or not there.

    `worst tensor` is the largest difference of one parameter's gradient, of the transformer alone.
    """
    found = {
        "loss": abs(own.loss - reference.loss) / abs(reference.loss),
        "gradient": apart(own.gradients, reference.gradients),
        "update": apart(own.updates, reference.updates),
    }
    if reference.alone:
        norms = {name: float(tensor.norm()) for name, tensor in reference.alone.items()}
        least = LEAST_SHARE * torch.tensor(list(norms.values())).norm()
        single = [apart(own.alone, reference.alone, name) for name, norm in norms.items() if norm > least]
        found |= {
            "transformer alone": apart(own.alone, reference.alone),
            "worst tensor": float(torch.tensor(single).max()),  # NaN, if one is
        }
    return found


def apart(own: dict[str, Tensor], reference: dict[str, Tensor], name: str | None = None) -> float:
    """The norm of the difference over that of the reference: of all tensors, or of one."""
    if own.keys() != reference.keys():
        return float("nan")
    names = reference if name is None else [name]
    return distance([own[each] for each in names], [reference[each] for each in names])
