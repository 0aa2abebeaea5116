"""What is measured, in order of worth, and how long each part may take.

Nothing that uses the GPU is imported here: the process that starts the parts takes none of its memory.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

RECIPES = ("LoRA", "QLoRA", "all weights, 8-bit states")
VARIANTS = (
    "all weights, stepped in the backward pass",
    "LoRA, ReFL",
    "LoRA, DRaFT-LV",
    "LoRA, 256 px, no gradient checkpointing",
)
"""Names in benchmarks/gpu/recipes.py, which takes long to import."""


class Part(NamedTuple):
    """A part of the benchmark.

    Args:
        function: Function that measures it, which takes a Scale and `arguments`, as `module:name` of this package.
        limit_s: Seconds that it may take, with its start.
        shows: What it shows, in a sentence.
        arguments: Further arguments.
        decides: Whether its failure is one of the whole.
    """

    function: str
    limit_s: int
    shows: str
    arguments: Mapping[str, Any] = {}
    decides: bool = True


def _peaks(case: str) -> Part:
    shows = "Highest memory by phase of the second of two steps, and what `estimate` predicts: within 10 %."
    return Part("peaks:peaks", 240, shows, {"case": case})


def _cudnn_attention(trained: str) -> Part:
    shows = (
        "The part `correctness` with cuDNN's attention, which no run uses, because its gradient was wrong: whether it "
        "still is. It decides nothing."
    )
    return Part("correctness:cudnn_attention", 180, shows, {"trained": trained}, decides=False)


PARTS: Mapping[str, Part] = {
    "correctness": Part(
        "correctness:correctness",
        300,
        "A training step from the same seed on the GPU and on the CPU: how far loss, gradients and updated weights are "
        "apart, over the size of what the CPU has in float32.",
    ),
    "resume": Part(
        "resume:resume",
        240,
        "`fit` for three steps, and for two and one more by --ckpt_path last, with deterministic kernels: tensors of "
        "the last checkpoint that are equal bit for bit.",
    ),
    **{f"memory: {case}": _peaks(case) for case in RECIPES},
    "speed": Part(
        "speed:speed",
        420,
        "Seconds of a micro-batch with its optimizer step, LoRA recipe, eager and with compiled blocks. Model FLOPs "
        "leave recomputation out; the matrix rate is that of products of square bfloat16 matrices on this card.",
    ),
    "four bits": Part(
        "four_bits:four_bits",
        180,
        "Layers in 4 bits: their product and gradient beside those of the same weights written out, and their time "
        "beside bfloat16.",
    ),
    "attention": Part("passes:attention_kernels", 180, "Passes of the transformer by attention kernel, LoRA recipe."),
    "rollouts": Part(
        "rollouts:rollouts",
        240,
        "What several training steps on one rollout save, and a cache of features: none, one whose threshold is never "
        "reached, and one that always is. What a trained model saves lies between the last two.",
    ),
    "guidance": Part(
        "rollouts:guidance",
        240,
        "What guidance by a second pass costs, Stable Diffusion 3.5 medium with the LoRA recipe.",
    ),
    "two ranks": Part(
        "two_ranks:two_ranks",
        180,
        "Two processes that divide the model by FSDP2 on this one card, through gloo, against one process.",
    ),
    "starts": Part(
        "starts:starts",
        540,
        "Seconds from a folder of FLUX.1-dev's size, whose pages are in memory, to weights on the GPU.",
    ),
    "checkpointing": Part(
        "passes:checkpointing", 180, "Passes of the transformer with and without recomputing its blocks, LoRA recipe."
    ),
    **{f"memory: {case}": _peaks(case) for case in VARIANTS},
    "optimizers": Part(
        "optimizer_steps:optimizer_steps",
        180,
        "AdamW by several libraries on the weights of two of FLUX.1-dev's blocks.",
    ),
    **{f"cuDNN attention: {trained}": _cudnn_attention(trained) for trained in ("LoRA", "QLoRA")},
}
"""By name."""
