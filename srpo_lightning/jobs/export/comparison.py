"""A picture or clip of a checkpoint by this project's sampler, and what the code of the model card draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL.Image import Image

from srpo_lightning.batch import Conditions, Text
from srpo_lightning.encoding import TextEncoder
from srpo_lightning.evaluation.pictures import as_picture, contact_sheet, moving_sheet, write_clip
from srpo_lightning.module import SRPOModule
from srpo_lightning.policies.flow_policy import FlowPolicy


class Difference(NamedTuple):
    """Of two pictures, or of all frames of two clips.

    Args:
        mean: Mean of the absolute difference of pixels, which are in [0, 1] and in 8 bits.
        largest: Largest absolute difference of a pixel.
        allowed: Largest mean that passes.
    """

    mean: float
    largest: float
    allowed: float

    def __str__(self) -> str:
        """The numbers in words."""
        return f"mean {self.mean:.2g}, largest {self.largest:.2g}, of a range of 1; allowed mean {self.allowed:.2g}"


def own_frames(module: SRPOModule, encoder: TextEncoder, prompt: str, device: torch.device) -> list[Image]:
    """By the module's sampler, from the noise that a generator with its seed gives diffusers; one picture, or a clip.

    Text encoders and transformer are on the device one after the other. In bfloat16 it computes under autocast.

    Args:
        module: Module with its models, and with the checkpoint's weights.
        encoder: Encoder of texts, of the dtype that the models have.
        prompt: Prompt of the picture.
        device: Device that computes.
    """
    policy = module.policy
    assert isinstance(policy, FlowPolicy)
    texts = [[prompt], *([] if encoder.negative is None else [[encoder.negative]])]
    text, *negative = (
        Text.collate(encoder.encode(own), encoder.ragged).each(
            lambda t: (t.float() if t.is_floating_point() else t).to(device)
        )
        for own in texts
    )
    encoder.unload()
    noise = policy.pipeline_noise(torch.Generator().manual_seed(module.seed), encoder.dtype)
    module.to(device)
    conditions = Conditions([prompt], text, torch.zeros(1, dtype=torch.int64, device=device))
    conditions = conditions._replace(unconditional=negative[0] if negative else None)
    with torch.autocast(device.type, torch.bfloat16, enabled=encoder.dtype == torch.bfloat16):
        images = module.sample(conditions, noise)
    return [as_picture(frame) for frame in (images[0].unbind(1) if images.ndim == 5 else images)]


def difference(ours: Sequence[Image], theirs: Sequence[Image], allowed: float) -> Difference:
    """Measured over all pixels of all frames."""
    a, b = (np.stack([np.asarray(frame) for frame in frames]) / 255 for frames in (ours, theirs))
    distance = np.abs(a - b)
    return Difference(float(distance.mean()), float(distance.max()), allowed)


def write_pictures(folder: Path, **kinds: Sequence[Image]) -> None:
    """Under each other in one file, and clips moving in another beside their first frames."""
    folder.mkdir()
    contact_sheet({name: frames[:1] for name, frames in kinds.items()}).save(folder / "pictures.png")
    if any(len(frames) > 1 for frames in kinds.values()):
        write_clip(folder / "clips.webp", moving_sheet({name: [frames] for name, frames in kinds.items()}))
