"""A program of two ranks: velocities and gradients of a family whose tokens they share, against one that has all."""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import distributed

from srpo_lightning.batch import Conditions, Text
from srpo_lightning.encoding import Encoding
from srpo_lightning.policies import FluxPolicy
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.training.context import new_context
from tests.families.cases import CASES

PROMPTS = ["a cat", "3 dogs, running in the park"]


def conditions_of(policy: FlowPolicy, differ: bool) -> Conditions:
    """Of both prompts; where the family keeps their own lengths they differ, and the longest cannot be halved."""
    text = policy.encoder(Encoding()).text
    items = text.encode(PROMPTS if differ else PROMPTS[1:] * 2)
    longest = max(len(item["prompt_embeds"]) for item in items)
    if text.ragged:
        items = [{"prompt_embeds": item["prompt_embeds"][: longest - 1 + longest % 2]} for item in items]
    return Conditions(PROMPTS, Text.collate(items, text.ragged), torch.arange(2))


def step(policy: FlowPolicy, conditions: Conditions, autocast: bool) -> dict[str, torch.Tensor]:
    """Velocities of two steps, the gradient of the noise through both, and the weights' gradients."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, *policy.latent_shape(), generator=draw, requires_grad=True)
    weight = torch.randn(x.shape, generator=draw)
    policy.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        first = policy(x, torch.tensor([0.9, 0.7]), conditions, 1.0)
        second = policy(x - 0.3 * first, torch.tensor([0.6, 0.4]), conditions, 1.0)
    (second * weight).sum().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return {"first": first.detach(), "second": second.detach(), "noise": x.grad, **gradients}


def main() -> None:
    """Of a family, in a folder with its model; further words are settings that are true, `autocast` and `alike`."""
    family, folder, *words = sys.argv[1:]
    settings = dict.fromkeys(set(words) - {"autocast", "alike"}, True)
    cls = FluxPolicy if family == "flux" else CASES[family].policy
    if family == "wan":
        settings["num_frames"] = 5
    policy = cls(str(Path(folder)), 32, 32, **settings)
    policy.load()
    conditions = conditions_of(policy, "alike" not in words)
    whole = step(policy, conditions, "autocast" in words)
    distributed.init_process_group("gloo")
    context = new_context(2, 2, "cpu")
    policy.divide(context)
    parts = step(policy, conditions, "autocast" in words)
    assert parts.keys() == whole.keys()
    tolerance = 0.03 if "autocast" in words else 1e-5
    for name, tensor in parts.items():
        if name not in ("first", "second", "noise"):
            distributed.all_reduce(tensor)  # as strategies do
            tensor /= 2
        error = (tensor - whole[name]).norm() / whole[name].norm().clamp_min(1e-4)
        print(name, float(error))
        assert error < tolerance, (name, float(error))
    distributed.destroy_process_group()
