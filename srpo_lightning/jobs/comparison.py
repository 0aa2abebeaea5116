"""Pictures of a checkpoint by this project's sampler, and of its export by plain diffusers, from the same noise."""

from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks.pictures import as_picture, contact_sheet
from srpo_lightning.draws import sample_noise
from srpo_lightning.module import SRPOModule
from srpo_lightning.policies import FluxPolicy


class Difference(NamedTuple):
    """Of two kinds of pictures of the same prompts.

    Args:
        mean: of the pixels' absolute difference; they are in [0, 1].
        largest: of it.
        allowed: of the mean.
    """

    mean: float
    largest: float
    allowed: float

    def __str__(self) -> str:
        """The numbers in words."""
        return f"mean {self.mean:.2g}, largest {self.largest:.2g}, of a range of 1; allowed mean {self.allowed:.2g}"


def own_pictures(module: SRPOModule, conditions: Conditions, *, mixed: bool) -> Tensor:
    """By the module's sampler, [B, 3, H, W] on the CPU.

    Args:
        module: with its models, and with the checkpoint's weights.
        conditions: what of, on the module's device.
        mixed: compute in bfloat16 under autocast.
    """
    with torch.autocast(module.device.type, torch.bfloat16, enabled=mixed):
        return module.sample(conditions).float().cpu()


def plain_pictures(pipeline: FluxPipeline, module: SRPOModule, conditions: Conditions, *, mixed: bool) -> Tensor:
    """The same by diffusers' pipeline; the module's models play no part."""
    policy, device = module.policy, conditions.prompt_embeds.device
    assert isinstance(policy, FluxPolicy)
    if policy.resolution_shift is not None:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            pipeline.scheduler.config, use_dynamic_shifting=policy.resolution_shift
        )
    height, width = conditions.size or policy.size
    shape = policy.latent_shape((height, width))
    noise = sample_noise(module.seed, conditions.indices.tolist(), shape, conditions.seeds)
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        images: Tensor = pipeline.to(device)(
            prompt_embeds=conditions.prompt_embeds.float(),
            pooled_prompt_embeds=conditions.pooled_prompt_embeds.float(),
            latents=noise.to(device),
            height=height,
            width=width,
            num_inference_steps=module.num_sample_steps,
            guidance_scale=module.sample_guidance,
            output_type="pt",
        ).images
    return images.float().cpu()


def difference(ours: Tensor, theirs: Tensor, allowed: float) -> Difference:
    """Measured over all pixels."""
    distance = (ours - theirs).abs()
    return Difference(float(distance.mean()), float(distance.max()), allowed)


def write_pictures(folder: Path, **kinds: Tensor) -> None:
    """One row of pictures per kind, under each other in one file."""
    folder.mkdir()
    contact_sheet({name: [as_picture(image) for image in images] for name, images in kinds.items()}).save(
        folder / "pictures.png"
    )
