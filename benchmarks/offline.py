"""Seconds of training to a given share of the positive style: by rollouts, by real pictures, and half and half.

python -m tools.emoji pictures runs/emoji_pictures
python -m benchmarks.offline [--share 0.5] [--max_steps 48]

Fits the built-in model on the training concepts and evaluates on the others. Each run's seconds are those of its
training steps, as it logs them; evaluations are left out. The runs take turns in one process, evaluation by evaluation,
so that a machine whose speed changes changes it for all of them.
"""

from pathlib import Path

from jsonargparse import auto_cli

from experiments.objectives.results import first_crossing, training_seconds
from srpo_lightning.cli import main as command
from srpo_lightning.run_folder import RunFolder

CONFIG = "configs/emoji_srpo_offline.yaml"
RATIOS = {"online": 0.0, "mixed": 0.5, "offline": 1.0}


def main(
    share: float = 0.5,
    max_steps: int = 48,
    every: int = 12,
    samples: int = 2,
    folder: str = "runs/offline",
    label: str = "3d",
) -> None:
    for step in range(every, max_steps + 1, every):
        for name, ratio in RATIOS.items():
            advance(Path(folder) / name, ratio, step, every, samples)
    head = f"share of {label} / top5 / judge, by step"
    print(f"{'':8} {'s/step':>7} {f'steps to {share:.0%}':>14} {'seconds':>8}   {head}")
    for name in RATIOS:
        run = Path(folder) / name
        points = {r["step"]: r for r in RunFolder(run).read_metrics() if r["weights"] == "policy"}
        seconds = training_seconds(run)
        each = sum(seconds.values()) / len(seconds)
        reached = first_crossing(((step, r[f"share/{label}"]) for step, r in sorted(points.items())), share)
        found = f"{reached:14.1f} {reached * each:8.1f}" if reached else f"{'never':>14} {'':8}"
        curve = ", ".join(
            f"{step}: {r[f'share/{label}']:.2f}/{r['top5']:.2f}/{r['judge']:.2f}" for step, r in sorted(points.items())
        )
        print(f"{name:8} {each:7.3f} {found}   {curve}")


def advance(run: Path, ratio: float, step: int, every: int, samples: int) -> None:
    """Train up to a step, from where the run stands."""
    if RunFolder(run).checkpoint(step).exists():
        return
    resume = ["--ckpt_path", "last"] if step > every else []
    command(
        ["fit", "--config", CONFIG, "--trainer.default_root_dir", str(run), "--data.offline_ratio", str(ratio),
         "--model.objective.num_rollout_steps", "12", "--trainer.max_steps", str(step),
         "--trainer.val_check_interval", str(every), "--checkpoint.every_n_steps", str(every),
         "--checkpoint.keep", "1000", "--trainer.enable_model_summary", "false",
         "--data.eval_samples_per_prompt", str(samples), *resume]
    )  # fmt: skip


if __name__ == "__main__":
    auto_cli(main)
