"""The Python of a model card, and what it draws when it is run as it is printed."""

import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from srpo_lightning.evaluation.pictures import FRAME_MS
from srpo_lightning.jobs.export.formats import Format
from srpo_lightning.module import SRPOModule


def python(written: Format, module: SRPOModule, folder: Path, prompt: str, max_sequence_length: int) -> str:
    """Code that ends with one `picture`, or with a `clip` of pictures; every foreign text in it is a literal.

    Args:
        written: Form of what is in the folder.
        module: Module, whose settings of sampling count.
        folder: Folder of the files.
        prompt: Prompt of the picture.
        max_sequence_length: Tokens per prompt that the model was trained with.
    """
    policy = written.policy
    height, width = policy.size
    arguments = policy.pipeline_arguments(module.sample_guidance, max_sequence_length)
    lines = written.python(folder)
    if policy.resolution_shift is not None:
        lines += [
            "pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(",
            f"    pipe.scheduler.config, use_dynamic_shifting={policy.resolution_shift}",
            ")",
        ]
    lines += [
        "if torch.cuda.is_available():",
        "    pipe.enable_model_cpu_offload()  # one model at a time on the GPU",
        f"{'clip' if policy.num_frames > 1 else 'picture'} = pipe(",
        f"    prompt={prompt!a},",
        f"    height={height},",
        f"    width={width},",
        f"    num_inference_steps={module.num_sample_steps},",
        *(f"    {name}={value!a}," for name, value in arguments.items()),
        f"    generator=torch.Generator().manual_seed({module.seed}),",
        f").{policy.pipeline_clip if policy.num_frames > 1 else policy.pipeline_picture}",
    ]
    if policy.num_frames > 1:
        lines.append(f'# clip[0].save("clip.webp", save_all=True, append_images=clip[1:], duration={FRAME_MS}, loop=0)')
    classes = ("FlowMatchEulerDiscreteScheduler", policy.pipeline_class, policy.transformer_class)
    used = [name for name in classes if any(f"{name}." in line for line in lines)]
    return "\n".join(["import torch", f"from diffusers import {', '.join(used)}", "", *lines])


def run(code: str, device: torch.device, given: dict[str, Any]) -> dict[str, Any]:
    """The names that the code leaves behind.

    Args:
        code: Code as `python` wrote it.
        device: Device that runs it; the CPU hides a GPU from it.
        given: Values of names that it needs, if it is not printed alone.

    Raises:
        ValueError: with the code's own error, if it fails.
    """
    names = dict(given)
    has_gpu = device.type != "cpu" and torch.cuda.is_available()
    with warnings.catch_warnings(), patch.object(torch.cuda, "is_available", return_value=has_gpu):
        warnings.simplefilter("ignore")  # diffusers 0.42 would rather hear dtype, older ones torch_dtype
        try:
            exec(compile(code, "README.md", "exec"), names)
        except Exception as error:
            told = " ".join(str(error).split())
            raise ValueError(
                f"the code of the model card fails with {type(error).__name__} ({told}): give the machine what it "
                "needs, or leave the check out with --check false"
            ) from error
    return names
