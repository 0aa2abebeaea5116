"""An optimizer step of 32 prompts is the same, however they are divided over ranks and micro-batches."""

import json
from pathlib import Path

import pytest
import torch

from srpo_lightning.cli import main
from srpo_lightning.draws import Draws
from srpo_lightning.run_folder import RunFolder
from tests import processes, tiny

LAYOUTS = {"1 x 32": (1, 32, 1), "1 x 8 x 4": (1, 8, 4), "32 x 1": (1, 1, 32), "2 ranks x 4 x 4": (2, 4, 4)}
"""Ranks, samples of a micro-batch, micro-batches of a step."""


@pytest.mark.parametrize(("ranks", "size", "micro_batches"), [(1, 1, 32), (8, 1, 4), (32, 1, 1), (2, 4, 4)])
def test_noise_and_words_are_the_steps_and_positions_the_samples_in_every_layout(ranks, size, micro_batches):
    whole, step = Draws(0, 3), {"micro_batch": range(micro_batches), "rank": range(ranks)}
    parts = [Draws(0, 3, rank, m, ranks) for m in step["micro_batch"] for rank in step["rank"]]
    positions = torch.cat([part.integers("position", 5, 995, size, shared=False) for part in parts])
    assert torch.equal(positions, whole.integers("position", 5, 995, 32, shared=False))
    assert len(positions.unique()) > 25
    noise = torch.cat([part.noise((size, 2), shared=True) for part in parts])
    assert torch.equal(noise, whole.noise((32, 2), shared=True))
    assert {part.step for part in parts} == {3}  # control words go by it


def weights_after(models, features: Path, run: Path, layout: str) -> dict[str, torch.Tensor]:
    """Two steps of plain gradient descent, whose change of the weights is the gradient's."""
    ranks, size, micro_batches = LAYOUTS[layout]
    settings = tiny.config(models, run, features)
    settings["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    settings["data"]["batch_size"] = size
    trainer = {"max_steps": 2, "accumulate_grad_batches": micro_batches, "limit_val_batches": 0}
    settings["trainer"] |= trainer | {"num_sanity_val_steps": 0, "gradient_clip_val": 0, "callbacks": []}
    if ranks > 1:
        settings["trainer"] |= {"devices": ranks, "strategy": "ddp"}
    config = run.with_suffix(".json")
    config.write_text(json.dumps(settings))
    if ranks == 1:
        main(["fit", "--config", str(config)])
    else:
        done = processes.start(["fit", "--config", str(config)], ranks)
        assert done.returncode == 0, done.output
    state: dict[str, torch.Tensor] = torch.load(RunFolder(run).checkpoint(2), weights_only=True)["state_dict"]
    return state


def test_steps_are_equal_up_to_the_order_of_sums(models, features, tmp_path):
    """Without the counting of samples over micro-batches each layout would have drawn its own noise and positions."""
    ends = {layout: weights_after(models, features, tmp_path / layout.replace(" ", ""), layout) for layout in LAYOUTS}
    first, *others = ends.values()
    before = {f"policy.{name}": p.detach() for name, p in tiny.new_policy(models).named_parameters()}
    for other in others:
        for name, weight in first.items():
            moved = (weight - before[name]).norm()
            assert (other[name] - weight).norm() <= 1e-4 * moved + 1e-7, name
