"""Which loops of Lightning's trainer a run can have, told from the configuration."""

from typing import Any

LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "limit_predict_batches": 0,
    "log_every_n_steps": 0,
    "max_steps": -1,
    "min_steps": 0,
    "num_nodes": 1,
    "val_check_interval": 0,
}
"""Numbers below which Lightning stumbles, or does another thing than is meant."""


def check_loops(trainer: Any, command: str) -> None:
    """Refuse settings that Lightning would not understand here, or would take for something else.

    The stream of training prompts has no end, and an evaluation is of all evaluation prompts, so that all compare.

    Args:
        trainer: Settings of the trainer, as attributes.
        command: Name of the command: fit, validate, test or predict.

    Raises:
        ValueError: naming the setting and the cure.
    """
    if trainer.fast_dev_run:
        return  # which sets its own limits
    for name, least in LEAST.items():
        value = getattr(trainer, name)
        if isinstance(value, int | float) and value < least:
            raise ValueError(f"trainer.{name} is {value}: expected {least} or more")
    evaluation = "data.num_eval_prompts, which says how many prompts every evaluation has"
    whole: dict[str, tuple[Any, ...]] = {"limit_val_batches": (None, 0, 1.0), "limit_test_batches": (None, 0, 1.0)}
    for name, allowed in whole.items():
        value = getattr(trainer, name)
        if value not in allowed or (value == 1 and isinstance(value, int)):
            raise ValueError(
                f"trainer.{name} is {value}: the numbers of a part would be compared with those of all evaluation "
                f"prompts; leave it out (0: no evaluation), and set {evaluation}"
            )
    if not trainer.enable_checkpointing and trainer.enable_checkpointing is not None:
        raise ValueError(
            "trainer.enable_checkpointing is false, but a run keeps checkpoints: leave it out, and set "
            "checkpoint.every_n_steps and checkpoint.keep to have few; trainer.fast_dev_run tries a run without any"
        )
    if command == "fit":
        _check_training(trainer, evaluation)


def _check_training(trainer: Any, evaluation: str) -> None:
    for name in ("max_steps", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise ValueError(
                f"trainer.{name} is 0: nothing would be trained; `validate` measures the weights as they are"
            )
    ends = (trainer.max_time, None if trainer.max_epochs == -1 else trainer.max_epochs)
    if trainer.max_steps in (None, -1) and ends == (None, None):
        raise ValueError(
            "trainer.max_steps is not set, and the stream of prompts has no end: set it, usually to 20 for all weights "
            "(the official run's) or 40 for an adapter, and to some hundreds for other objectives; or set "
            "trainer.max_time"
        )
    if trainer.max_steps > 0 and (trainer.min_steps or 0) > trainer.max_steps:
        raise ValueError(
            f"trainer.min_steps is {trainer.min_steps}, more than trainer.max_steps, {trainer.max_steps}: leave it out"
        )
    if trainer.use_distributed_sampler:
        raise ValueError(
            "trainer.use_distributed_sampler is true: Lightning would put its own order in the place of the stream of "
            "prompts, which is divided over ranks already; leave it at false"
        )
    limit, accumulate = trainer.limit_train_batches, int(trainer.accumulate_grad_batches)
    if trainer.num_sanity_val_steps not in (None, 0, -1):
        raise ValueError(
            f"trainer.num_sanity_val_steps is {trainer.num_sanity_val_steps}: the evaluation before training is what "
            f"later ones are compared with; set it to -1 for all of it, or to 0 for none, and {evaluation}"
        )
    between = trainer.val_check_interval
    if trainer.check_val_every_n_epoch is None and (not between or isinstance(between, float)):
        found = "null" if between is None else between
        raise ValueError(
            f"trainer.val_check_interval is {found} while trainer.check_val_every_n_epoch is null: set it to the whole "
            "number of micro-batches between evaluations"
        )
    if isinstance(between, int) and between % accumulate and trainer.limit_val_batches != 0:
        raise ValueError(
            f"trainer.val_check_interval is {between} micro-batches, which trainer.accumulate_grad_batches, "
            f"{accumulate}, does not divide: an evaluation would be in the middle of a step; set it to "
            f"{-(-between // accumulate) * accumulate}"
        )
    if trainer.overfit_batches:
        raise ValueError(
            f"trainer.overfit_batches is {trainer.overfit_batches}: the stream of training prompts goes on all the "
            "same; set data.train to a file with the few prompts"
        )
    if isinstance(limit, float) and limit != 1.0:
        raise ValueError(
            f"trainer.limit_train_batches is {limit}: the stream of training prompts has no end to take a part of; set "
            "trainer.max_steps, or a whole number of batches per epoch"
        )
    if isinstance(limit, int) and limit % accumulate:
        raise ValueError(
            f"trainer.limit_train_batches is {limit}, which trainer.accumulate_grad_batches, {accumulate}, does not "
            "divide: the last step of an epoch would be of fewer batches; set it to "
            f"{-(-limit // accumulate) * accumulate}"
        )
    for name in ("max_epochs", "min_epochs"):
        value = getattr(trainer, name)
        if value not in (None, -1) and not isinstance(limit, int):
            raise ValueError(
                f"trainer.{name} is {value}, but the stream of training prompts has no end and so no epochs: set "
                "trainer.max_steps (prompts / (ranks x data.batch_size x accumulate_grad_batches) is one pass), or "
                "give epochs a length with trainer.limit_train_batches"
            )
