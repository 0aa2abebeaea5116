"""Where OverOptimizationGuard stops a run that is trained too hard, against the best point of the whole run.

python -m benchmarks.guard [--lr 1e-4] [--max_steps 60] [--every 5] [--seeds [0]]

One run of the built-in model without a guard, evaluated every few steps to its end, is the exhaustive search; then the
guard looks at the same evaluations in order, as it would have in training, which it does not change before it stops.
Regret: the best held-out score of the whole run less that of the checkpoint that the guard recommends.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import yaml
from jsonargparse import auto_cli

from srpo_lightning.callbacks import OverOptimizationGuard
from srpo_lightning.cli import main as train
from srpo_lightning.config.classes import is_class
from srpo_lightning.evaluation.comparison import BASE, HELD_OUT, summary
from srpo_lightning.evaluation.exchange import Evaluation, Evaluations
from srpo_lightning.run_folder import RunFolder

CONFIG = "configs/emoji_srpo.yaml"


def main(
    lr: float = 1e-4,
    max_steps: int = 60,
    every: int = 5,
    samples: int = 2,
    seeds: tuple[int, ...] = (0,),
    patience: tuple[int, ...] = (1, 2),
    folder: str = "runs/guard",
    config: str = CONFIG,
) -> None:
    for seed in seeds:
        run = Path(folder) / f"lr-{lr:g}-seed-{seed}"
        if not RunFolder(run).table(max_steps, "policy").is_file():
            train(
                ["fit", "--config", unguarded(config, run), "--trainer.default_root_dir", str(run),
                 "--seed_everything", str(seed),
                 "--model.optimizer.lr", str(lr), "--trainer.max_steps", str(max_steps),
                 "--trainer.val_check_interval", str(every), "--checkpoint.every_n_steps", str(every),
                 "--data.eval_samples_per_prompt", str(samples)]
            )  # fmt: skip
        evaluations = read_evaluations(run, range(0, max_steps + 1, every))
        print(f"\nseed {seed}, learning rate {lr:g}")
        print("step   reward    judge   prompt  held-out  diversity   drift")
        for step, (_, numbers) in evaluations.items():
            values = (numbers[name] for name in ("reward", "judge", "prompt", HELD_OUT, "diversity"))
            print(f"{step:4}" + "".join(f"{value:9.3f}" for value in values) + f"{numbers.get('drift', 0):11.4f}")
        best = max(evaluations, key=lambda step: evaluations[step].numbers[HELD_OUT])
        print(f"best held-out score: {evaluations[best].numbers[HELD_OUT]:.3f} at step {best}")
        for number in patience:
            print(verdict(evaluations, number, best))


def unguarded(config: str, run: Path) -> str:
    """The same configuration without the guard, in a file beside the run."""
    settings = yaml.safe_load(Path(config).read_text())
    settings["default_callbacks"] = False
    callbacks = settings["trainer"]["callbacks"]
    settings["trainer"]["callbacks"] = [
        own for own in callbacks if not is_class(own["class_path"], OverOptimizationGuard)
    ]
    path = run.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def read_evaluations(run: Path, steps: range) -> dict[int, Evaluation]:
    """What was measured at each step, of the policy's own weights."""
    base = RunFolder(run).read_base()
    found = {}
    for step in steps:
        table = RunFolder(run).read_table(step, "policy")
        if table is not None:
            found[step] = Evaluation(table, summary(table, base if step else None, []))
    return found


def verdict(evaluations: dict[int, Evaluation], patience: int, best: int) -> str:
    """Where a guard would have stopped, and what that costs."""
    guard = OverOptimizationGuard(patience=patience)
    trainer = SimpleNamespace(should_stop=False, optimizers=[], lr_scheduler_configs=[])
    last = max(evaluations)
    for step, evaluation in evaluations.items():
        found = {"policy": evaluation, BASE: evaluations[min(evaluations)]}
        guard.watch(trainer, Evaluations(step, found))  # type: ignore[arg-type]
        if trainer.should_stop:
            last = step
            break
    values = {step: evaluation.numbers[HELD_OUT] for step, evaluation in evaluations.items()}
    return json.dumps(
        {
            "patience": patience,
            "stopped_at": last if trainer.should_stop else None,
            "recommends": guard.best_step,
            "regret": round(values[best] - values[guard.best_step], 4),
            "regret_of_the_last_step": round(values[best] - values[max(values)], 4),
        }
    )


if __name__ == "__main__":
    auto_cli(main)
