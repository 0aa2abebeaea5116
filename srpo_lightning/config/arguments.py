"""What a configuration file may hold beside its classes' own arguments, for every command that reads one."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import Any, NoReturn

import jsonargparse
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]  # it is public and documented
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from srpo_lightning.callbacks import RunCheckpoint
from srpo_lightning.config.defaults import complete
from srpo_lightning.config.names import COMMANDS
from srpo_lightning.config.shipped import by_name, with_builtin
from srpo_lightning.config.values import check_values
from srpo_lightning.data import PromptData
from srpo_lightning.encoding import Encoder, Encoding
from srpo_lightning.errors import explain, naming
from srpo_lightning.module import SRPOModule
from srpo_lightning.policies.base import Policy
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

    def format_help(self, *args: Any) -> str:
        """This project's settings first and Lightning's Trainer last, below one line of usage in place of sixty."""
        usage, groups, command = self.usage, self._action_groups, self.prog.split()[-1]
        if command in COMMANDS:
            self.usage = f"python -m srpo_lightning {command} --config FILE [--config FILE ...] [--SETTING VALUE ...]"
        self._action_groups = sorted(groups, key=_is_of_trainer)
        try:
            return super().format_help(*args)
        finally:
            self.usage, self._action_groups = usage, groups

    @property
    def settings(self) -> set[str]:
        """The dotted names of all settings, those of a command without its name."""
        names = set()
        for action in self._actions:  # argparse tells its options by no public name
            if isinstance(action, argparse._SubParsersAction):
                names |= {name for parser in action.choices.values() for name in parser.settings}
            names |= {option.removeprefix("--") for option in action.option_strings if option.startswith("--")}
        return {name for name in names if not name.endswith((".help", "+"))}

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]  # overloaded
        """What cannot be read at all is no traceback either."""
        with naming("the configuration cannot be read") if self.exit_on_error else nullcontext():
            values = super().parse_args(*args, **kwargs)
            _replaced(with_builtin, values)
        own = values.get(str(values.get("subcommand")), values)
        check_settings(own.as_dict())
        complete(own)
        return values

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """Write a configuration down: with what it leaves unsaid, and `builtin:` names for what comes along."""
        settings = namespace.clone()
        complete(settings)
        return super().dump(_replaced(by_name, settings), *args, **kwargs)

    def _apply_actions(self, cfg: Any, parent_key: str = "", *args: Any, **kwargs: Any) -> Namespace:
        """A group that is empty is lost on the way: where no setting could be in it, make it one to be refused."""
        for group, key in list(_empty_groups(cfg, f"{parent_key}." if parent_key else "", self._places)):
            group[key] = None
        return super()._apply_actions(cfg, parent_key, *args, **kwargs)

    @property
    def _places(self) -> set[str]:
        """The dotted names under which settings are kept, those of a command with its name; of groups none."""
        names = set()
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names |= {f"{command}.{name}" for command, own in action.choices.items() for name in own._places}
            elif not action.dest.endswith(".help"):
                names.add(action.dest)
        return names - {name[:place] for name in names for place, letter in enumerate(name) if letter == "."}

    def instantiate_classes(self, *args: Any, **kwargs: Any) -> Any:
        """What a class refuses is told by its name."""
        with naming():
            return super().instantiate_classes(*args, **kwargs)


def _is_of_trainer(group: argparse._ArgumentGroup) -> bool:
    """Whether a group of a parser has the settings of Lightning's Trainer."""
    return any(action.dest.startswith("trainer.") for action in group._group_actions)


def _replaced(change: Callable[[Any, Callable[[Any], Any]], Any], value: Any) -> Any:
    """Settings with other texts in the place of some; namespaces are changed in place.

    Args:
        change: Function of a setting, and of what does the same to what a list or a mapping holds.
        value: Setting, or settings in their nesting.
    """
    if not isinstance(value, Namespace):
        return change(value, partial(_replaced, change))
    for key, own in vars(value).items():
        setattr(value, key, _replaced(change, own))
    return value


def _empty_groups(settings: Any, prefix: str, places: set[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """What holds an empty group in which no setting could be, and the group's name therein."""
    own = settings if isinstance(settings, dict) else vars(settings)
    for key, value in own.items():
        name = f"{prefix}{key}."
        if isinstance(value, dict | Namespace) and not any(name.startswith(f"{place}.") for place in places):
            if not value and not any(place.startswith(name) for place in places):
                yield own, key
            yield from _empty_groups(value, name, places)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what a parser lets pass.

    Args:
        settings: Settings of a command, as nested mappings.

    Raises:
        ValueError: naming the setting.
    """
    check_values(settings, OWNERS)


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
    parser.add_argument(
        "--default_callbacks",
        type=bool,
        default=True,
        help="Callbacks that are on without being named: EMA, SampleLogger, RewardTracking, Report, and with a judge "
        "OverOptimizationGuard. One that trainer.callbacks names takes the place of its own; false leaves out all.",
    )
    parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
    parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
    parser.link_arguments("model.updates_per_rollout", "data.repeats")
    parser.link_arguments("model", "data.encoder", compute_fn=encoder_of, apply_on="instantiate")
    parser.set_defaults(
        {
            "trainer.default_root_dir": "runs/default",
            "trainer.gradient_clip_val": 0.1,
            "trainer.use_distributed_sampler": False,
            "trainer.num_sanity_val_steps": -1,  # a part of the base's evaluation compares with nothing
            "trainer.check_val_every_n_epoch": None,  # the stream of prompts has no epochs
            "trainer.log_every_n_steps": 1,  # a step takes seconds to minutes
            # The module's own default is a function without a name, which config.yaml could not hold.
            "model.optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 5e-6, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-4},
            },
        }
    )


def encoder_of(module: SRPOModule) -> Callable[[Encoding], Encoder]:
    """What data makes its encoders with."""
    return module.policy.encoder


def new_module(settings: Namespace) -> SRPOModule:
    """The module of a configuration, its models not yet loaded."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(SRPOModule, "model")
    module: SRPOModule = parser.instantiate_classes(Namespace(model=settings.model.clone())).model
    return module


def new_policy(settings: Namespace) -> Policy:
    """The policy of a configuration, without weights."""
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(Policy, "policy")
    policy: Policy = parser.instantiate_classes(Namespace(policy=settings.model.policy.clone())).policy
    return policy


def new_data(settings: Namespace, policy: Policy) -> PromptData:
    """The prompts and pictures of a configuration.

    Args:
        settings: Settings of a configuration.
        policy: Policy of that configuration.
    """
    parser = LightningArgumentParser()
    parser.add_class_arguments(PromptData, "data", skip={"encoder"}, instantiate=False)
    values = parser.instantiate_classes(Namespace(data=settings.data.clone())).data
    return PromptData(encoder=policy.encoder, **vars(values))


def config_parser() -> Parser:
    """What reads configuration files for all commands, without a command's own settings; it raises what it refuses."""
    parser = Parser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_argument("--ckpt_path", type=str | None)
    parser.add_argument("--weights_only", type=bool | None)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(SRPOModule, "model")
    parser.add_lightning_class_args(PromptData, "data")
    add_project_arguments(parser)
    return parser


def read_config(*parts: str) -> Namespace:
    """What `fit --config` would read; a run's own config.yaml, which `fit` has written, as well.

    Args:
        parts: Configuration files, and settings as `--NAME=VALUE`; each changes what those before it say.

    Raises:
        ValueError: if a file is missing, or `fit` would not take it.
    """
    parser = config_parser()
    try:
        values = parser.parse_args([part if part.startswith("--") else f"--config={part}" for part in parts])
    except (jsonargparse.ArgumentError, TypeError) as error:
        told = explain(str(error), parser.settings)
        raise ValueError(told if any(part in told for part in parts) else f"{', '.join(parts)}: {told}") from error
    del values["config"]
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
