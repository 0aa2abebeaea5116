"""What a configuration file may hold beside its classes' own arguments, for every command that reads one."""

from lightning.pytorch.cli import LightningArgumentParser

from srpo_lightning.callbacks import RunCheckpoint


def add_project_arguments(parser: LightningArgumentParser) -> None:
    """What is said once counts everywhere."""
    parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
    parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
    parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
    for name in ("pretrained", "height", "width"):
        parser.link_arguments(f"model.policy.init_args.{name}", f"data.{name}")
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
