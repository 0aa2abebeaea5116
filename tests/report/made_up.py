"""A run folder that is made up: numbers, pictures and texts that are known, in the files that a run writes."""

import json
from pathlib import Path

import torch
import yaml
from PIL import Image

from srpo_lightning.evaluation.comparison import save_table
from srpo_lightning.evaluation.metrics import Table
from srpo_lightning.evaluation.pictures import write_picture
from srpo_lightning.run_folder import RunFolder

MARKUP = "</script><script>document.title = 'broken'</script><img src=x onerror=\"alert('1')\"> & {{script}}"
PROMPTS = ["a red apple", MARKUP, "quotes \" and ' and \u2028 a line", "the last"]
STEPS = (0, 10, 20)
NUM_LOGGED = 3
CLIP = "srpo_lightning.rewards.ClipReward"

CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "max_steps": 40,
        "default_root_dir": "runs/made_up",
        "callbacks": [
            {
                "class_path": "srpo_lightning.callbacks.RewardTracking",
                "init_args": {
                    "judge": {"class_path": CLIP, "init_args": {"pretrained": "the-judge"}},
                    "top_k": 5,
                },
            },
            {"class_path": "srpo_lightning.callbacks.OverOptimizationGuard", "init_args": {"patience": 2}},
        ],
    },
    "model": {
        "policy": {"class_path": "srpo_lightning.policies.FluxPolicy", "init_args": {"pretrained": "the-model"}},
        "reward": {"class_path": CLIP, "init_args": {"pretrained": "the-reward"}},
        "objective": {
            "class_path": "srpo_lightning.objectives.SRPO",
            "init_args": {"control_words": {"positive": ["bright", "<b>"], "negative": ["dark"]}, "margin": 0.9},
        },
        "num_sample_steps": 7,
    },
    "data": {"train": "train.txt", "evaluation": "eval.txt", "batch_size": 5},
}  # fmt: skip


def table(shift: float) -> Table:
    """Two samples of each prompt; the scores of sample i change by `shift` times i - 3."""
    indices = torch.arange(2 * len(PROMPTS))
    change = shift * (indices.double() - 3)
    columns = {"reward": 1 + 2 * change, "judge": 0.5 + change, "held_out": 0.25 + change, "saturation": 0.5 - change}
    return Table(indices, indices % len(PROMPTS), columns, torch.zeros(len(indices), 0))


def write_run(path: Path, shift: float = 0.01, prompts: list[str] | None = PROMPTS) -> RunFolder:
    """Three evaluations of policy and ema, of which the second drew the guard's objection.

    Args:
        path: Folder to write.
        shift: Change of the scores by each evaluation.
        prompts: Evaluation prompts that are recorded; None: none are.
    """
    run = RunFolder(path)
    path.mkdir(parents=True)
    run.config().write_text(yaml.safe_dump(CONFIG, allow_unicode=True))
    lines = []
    for number, step in enumerate(STEPS):
        for weights in ("policy", "ema") if step else ("policy",):
            own = table(number * shift * (1 if weights == "policy" else 2))
            save_table(run.table(step, weights), own, "")
            numbers = {name: float(column.mean()) for name, column in own.columns.items()}
            run.append_metrics({"step": step, "weights": weights, **numbers, "share/<b>": 0.5})
            lines += [picture(run, step, weights, index) for index in range(NUM_LOGGED)]
    save_table(run.base_table, table(0), "key")
    run.samples.metadata.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if prompts is not None:
        run.prompts.write_text(json.dumps([{"prompt": prompt, "tags": []} for prompt in prompts]))
    objection = {
        "step": 10,
        "weights": "policy",
        "reasons": ["diversity is <i>low</i>"],
        "best_step": 0,
        "action": "wait",
    }
    run.advice.write_text(json.dumps(objection) + "\n")
    return run


def picture(run: RunFolder, step: int, weights: str, index: int) -> dict:
    """Write a picture whose red says its step, green its weights, and blue its index; return its record."""
    record = {
        "step": step,
        "weights": weights,
        "index": index,
        "seed": 3,
        "prompt": PROMPTS[index % len(PROMPTS)],
        "guidance": 2.0,
        "num_steps": 7,
        "file": run.samples.name(step, weights, index),
        "scores": {"held_out": 0.25 + 0.01 * step, "judge": 0.5},
    }
    colour = (10 * step, 100 if weights == "ema" else 0, 80 * index)
    write_picture(run.samples.picture(step, weights, index), Image.new("RGB", (32, 48), colour), record)
    return record


def content_of(page: str) -> dict:
    """What a page shows, as its script reads it."""
    start = page.index('id="content">') + len('id="content">')
    return json.loads(page[start : page.index("</script>", start)])
