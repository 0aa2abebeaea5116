"""What the numbers of a run are, in words: the one place that says it of each name."""

from collections.abc import Mapping

from srpo_lightning.picture_statistics import STATISTICS

MEANINGS: Mapping[str, str] = {
    "reward": "The objective's form of the training reward on evaluation samples: what training raises.",
    "judge": "The same form under the judge, a model that is never trained against. It should rise with the reward.",
    "prompt": "The judge's score of picture and prompt: whether the picture still shows what was asked for.",
    "held_out": "The one number to choose checkpoints by: RewardTracking.held_out of the scores that training never "
    "sees, by default judge + prompt.",
    **{name: f"{own.meaning}." for name, own in STATISTICS.items()},
    "consistency": "Mean cosine between features of neighbouring frames of a clip, the judge's or else those of the "
    "first reward with an encoder of pictures. It is 1 where the clip stands still, and falls when things change.",
    "diversity": "Mean cosine distance between the judge's features of different pictures. It falls when they become "
    "alike.",
    "prompt_diversity": "The same between pictures of one prompt, mean over the prompts.",
    "drift": "Distance from the base's pictures in the judge's features (CMMD, 1000 x squared MMD): 0 where nothing "
    "has changed.",
    "train/loss": "Loss of a training step.",
    "train/gradient_norm": "Norm of a step's gradient before clipping.",
    "train/sigma": "Mean noise level of a step's samples, in [0, 1].",
    "train/kl": "Divergence from the base over a step's transitions.",
    "train/ratio_error": "Largest distance from 1 of a step's first probability ratios.",
    "train/seconds_rollout": "Time that a step spends on drawing, in seconds.",
    "train/seconds_update": "Time that a step spends on loss, gradient and update, in seconds.",
}
"""By the name in records and curves."""

FAMILIES: Mapping[str, str] = {
    "share/": "Share of samples that the judge finds most like the label {rest}.",
    "win/": "Share of samples with a higher {rest} than the base's from the same noise; 0.5 is chance.",
    "top": "Share of samples whose own prompt is among the judge's best {rest} candidates.",
    "train/reward": "Training reward of a step's samples, in the objective's form.",
    "train/": "What the objective logs of a step as {rest}.",
    "lr": "Learning rate.",
}
"""By the beginning of the name; `{rest}` is what follows."""


def meaning(name: str) -> str:
    """What a number is, in a sentence or two; further metrics of RewardTracking are all of one kind."""
    if name in MEANINGS:
        return MEANINGS[name]
    for start, text in FAMILIES.items():
        if name.startswith(start) and (start != "top" or name[len(start) :].isdecimal()):
            return text.replace("{rest}", name[len(start) :].lstrip("-_"))
    return "Score of picture and prompt by a further reward model of RewardTracking.metrics."
