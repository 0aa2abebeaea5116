"""What a checkpoint and the run that goes on from it must have in common."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from srpo_lightning.suggestions import moved


def checked_policy(saved: Mapping[str, Any] | None, fingerprint: str) -> Mapping[str, Any]:
    """What SRPOModule has written into a checkpoint, which is refused if it is another program's or policy's.

    Args:
        saved: What was found in the checkpoint; None: nothing.
        fingerprint: Architecture of the configured policy, as it names itself.

    Raises:
        ValueError: naming the cure.
    """
    if saved is None:
        raise ValueError("this checkpoint was not written by srpo_lightning: --ckpt_path needs one that was")
    if saved["policy"] != fingerprint:
        raise ValueError(
            "this checkpoint is of another policy: set model.policy to the one that it was trained with, or leave "
            f"--ckpt_path away.\n  checkpoint: {saved['policy']}\n  config:     {fingerprint}"
        )
    return saved


def check_shapes(saved: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose parameters are others than the trained ones, by their names and shapes.

    Raises:
        ValueError: naming the first that differs.
    """
    expected, found = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (trained, saved))
    if expected != found:
        names = expected.keys() | found.keys()
        odd = sorted(name for name in names if expected.get(name) != found.get(name))
        raise ValueError(
            f"this checkpoint differs from the policy in {len(odd)} parameters, first {odd[0]}: "
            f"found {found.get(odd[0])}, expected {expected.get(odd[0])}; set model.policy to the trained one"
        )


def check_optimizer(saved: str | None, optimizer: OptimizerCallable) -> None:
    """Refuse to go on from the states of an optimizer of another class; an old checkpoint tells none.

    Raises:
        ValueError: naming the cure.
    """
    present, saved = name_of_optimizer(optimizer), saved and (moved(saved) or saved)
    if saved and saved != present:
        raise ValueError(
            f"model.optimizer is {present}, which cannot go on from the states of {saved} in the checkpoint: set "
            f"model.optimizer.class_path to {saved}, or export the weights and start anew from them"
        )


def name_of_optimizer(optimizer: OptimizerCallable) -> str:
    """The class of an optimizer, as a class_path."""
    cls = type(optimizer([torch.nn.Parameter(torch.zeros(1))]))
    return f"{cls.__module__}.{cls.__qualname__}"
