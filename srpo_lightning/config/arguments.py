"""What a configuration file may hold beside its classes' own arguments, for every command that reads one."""

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from inspect import signature
from typing import Any, NoReturn

import jsonargparse
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from srpo_lightning.callbacks import RunCheckpoint
from srpo_lightning.config.values import check_values
from srpo_lightning.data import PromptData
from srpo_lightning.errors import explain, naming
from srpo_lightning.module import SRPOModule
from srpo_lightning.training.strategies import ReplicatedStrategy, ShardedStrategy

OWNERS = {"trainer": Trainer, "model": SRPOModule, "data": PromptData, "checkpoint": RunCheckpoint}
"""The classes whose arguments a configuration has without naming them."""


class Parser(LightningArgumentParser):
    """Says in one line what is wrong, and which setting was meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End, or raise where whoever made this parser asked for that."""
        if not self.exit_on_error:
            super().error(message, ex)
        own = getattr(ex, "subcommand_parser", None) or self
        raise SystemExit(f"error: {explain(message, own.settings)}") from ex

    @property
    def settings(self) -> set[str]:
        """The dotted names of all settings, those of a command without its name."""
        names = set()
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names |= {name for parser in action.choices.values() for name in parser.settings}
            names |= {option.removeprefix("--") for option in action.option_strings if option.startswith("--")}
        return {name for name in names if not name.endswith((".help", "+"))}

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]  # overloaded
        """What cannot be read at all is no traceback either."""
        with naming("the configuration cannot be read") if self.exit_on_error else nullcontext():
            values = super().parse_args(*args, **kwargs)
        plain = values.as_dict()
        check_settings(plain.get(str(plain.get("subcommand")), plain))
        return values

    def instantiate_classes(self, *args: Any, **kwargs: Any) -> Any:
        """What a class refuses is told by its name."""
        with naming():
            return super().instantiate_classes(*args, **kwargs)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what a parser lets pass.

    Args:
        settings: Settings of a command, as nested mappings.

    Raises:
        ValueError: naming the setting.
    """
    check_values(settings, OWNERS)
    if "model" not in settings or "data" not in settings:
        return
    policy = settings["model"]["policy"]
    if policy.get("init_args", {}).get("pretrained") is None and settings["data"].get("pretrained") is None:
        raise ValueError(
            f"model.policy.init_args.pretrained is missing: data reads the text encoders from there, so that the "
            f"constructor of {policy['class_path']} needs an argument of this name"
        )


def add_project_arguments(parser: LightningArgumentParser) -> None:
    """What is said once counts everywhere."""
    parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
    parser.add_argument(
        "--memory_check",
        type=bool,
        default=True,
        help="Prediction of the memory that large models need: `fit` refuses what cannot fit the device, before "
        "reading it.",
    )
    parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
    parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
    parser.link_arguments("model.updates_per_rollout", "data.repeats")
    for name in ("pretrained", "height", "width"):
        parser.link_arguments(f"model.policy.init_args.{name}", f"data.{name}")
    parser.set_defaults(
        {
            "trainer.default_root_dir": "runs/default",
            "trainer.gradient_clip_val": 0.1,
            "trainer.use_distributed_sampler": False,
            "trainer.num_sanity_val_steps": -1,  # a part of the base's evaluation compares with nothing
            # The module's own default is a function without a name, which config.yaml could not hold.
            "model.optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 5e-6, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-4},
            },
        }
    )


def read_config(path: str) -> Namespace:
    """What `fit --config` would read; a run's own config.yaml, which `fit` has written, as well.

    Raises:
        ValueError: if the file is missing, or `fit` would not take it.
    """
    parser = Parser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_argument("--ckpt_path", type=str | None)
    parser.add_argument("--weights_only", type=bool | None)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(SRPOModule, "model")
    parser.add_lightning_class_args(PromptData, "data")
    add_project_arguments(parser)
    try:
        values = parser.parse_path(path)
    except (jsonargparse.ArgumentError, TypeError) as error:
        told = explain(str(error), parser.settings)
        raise ValueError(told if path in told else f"{path}: {told}") from error
    check_settings(values.as_dict())
    return values


def sharded(shard_size: int, replicate_size: int = 1) -> Namespace:
    """`trainer.strategy` of a configuration: ShardedStrategy with these sizes and its defaults."""
    return _with_defaults(ShardedStrategy, shard_size=shard_size, replicate_size=replicate_size)


def _with_defaults(cls: type, **settings: Any) -> Namespace:
    defaults = {name: parameter.default for name, parameter in signature(cls).parameters.items()}
    class_path = f"{cls.__module__}.{cls.__qualname__}"
    return Namespace(class_path=class_path, init_args=Namespace(**defaults | settings))


def choose_strategy(config: Namespace, devices_per_node: int) -> str | None:
    """Put in the place of `trainer.strategy: auto` what it means on several devices, and of `ddp` what it means here.

    Weights are divided over the devices of a node and repeated on every node: they are gathered within it. Where a node
    has one device they are divided over the nodes. Weights in 4 bits cannot be divided, and get DDP.

    Returns:
        One line that says what was chosen; None where there was nothing to choose.
    """
    num_nodes = config.trainer.num_nodes
    if config.trainer.strategy == "ddp":
        config.trainer.strategy = _with_defaults(ReplicatedStrategy)
        return None
    if config.trainer.strategy != "auto" or devices_per_node * num_nodes == 1:
        return None
    if config.get("model.policy.init_args.quantize", "none") != "none":
        config.trainer.strategy = _with_defaults(ReplicatedStrategy)
        return "trainer.strategy auto: ddp, since weights in 4 bits cannot be divided over devices"
    sizes = (devices_per_node, num_nodes) if devices_per_node > 1 else (num_nodes, 1)
    config.trainer.strategy = sharded(*sizes)
    return (
        f"trainer.strategy auto: ShardedStrategy with shard_size {sizes[0]} and replicate_size {sizes[1]} "
        "(trainer.strategy ddp keeps all weights on every device)"
    )
