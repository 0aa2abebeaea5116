"""What a configuration file may hold beside its classes' own arguments, for every command that reads one."""

import jsonargparse
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from srpo_lightning.callbacks import RunCheckpoint
from srpo_lightning.data import PromptData
from srpo_lightning.module import SRPOModule


def add_project_arguments(parser: LightningArgumentParser) -> None:
    """What is said once counts everywhere."""
    parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
    parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
    parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
    parser.link_arguments("model.policy.init_args.pretrained", "data.pretrained")
    parser.set_defaults(
        {
            "trainer.default_root_dir": "runs/default",
            "trainer.gradient_clip_val": 0.1,
            "trainer.use_distributed_sampler": False,
            # The module's own default is a function without a name, which config.yaml could not hold.
            "model.optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 5e-6, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-4},
            },
            "trainer.plugins": [{"class_path": "srpo_lightning.checkpoints.AtomicCheckpointIO"}],
        }
    )


def read_config(path: str) -> Namespace:
    """What `fit --config` would read; a run's own config.yaml, which `fit` has written, as well.

    Raises:
        ValueError: if the file is missing, or `fit` would not take it.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_argument("--ckpt_path", type=str | None)
    parser.add_argument("--weights_only", type=bool | None)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(SRPOModule, "model")
    parser.add_lightning_class_args(PromptData, "data")
    add_project_arguments(parser)
    try:
        return parser.parse_path(path)
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
