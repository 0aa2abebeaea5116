"""FLUX.2 klein in small."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from srpo_lightning.policies import Flux2Policy
from srpo_lightning.policies.family import resolution_dependent_shift
from srpo_lightning.policies.packing import CELL
from tests.families import mistakes, qwen
from tests.families.case import Case


def transformer(**changes: Any) -> Flux2Transformer2DModel:
    size = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "timestep_guidance_channels": 16,
        "axes_dims_rope": (2, 2, 2, 2),
        "guidance_embeds": False,
    }
    found = qwen.noisy(Flux2Transformer2DModel(**size | changes))
    for name, part in found.named_children():
        if name != "time_guidance_embed":  # which shows how the pipeline's scheduler rounds the levels
            qwen.noisy(part, 0.15)
    return found


def vae() -> AutoencoderKLFlux2:
    found = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
        batch_norm_eps=0.01,
    )
    found.bn.running_mean.copy_(torch.linspace(-0.5, 1, 16))
    found.bn.running_var.copy_(torch.linspace(0.3, 2.5, 16))
    return qwen.noisy(found)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def write(folder: Path, is_distilled: bool = False, **changes: Any) -> Path:
    """A klein pipeline for 16 x 16 pictures and up; `changes` are of the transformer."""
    torch.manual_seed(0)
    tokenizer = qwen.tokenizer(48)
    text = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=28, tie_word_embeddings=False, **qwen.LANGUAGE)
    Flux2KleinPipeline(
        scheduler=scheduler(),
        vae=vae(),
        text_encoder=qwen.noisy(Qwen3ForCausalLM(text)),
        tokenizer=tokenizer,
        transformer=transformer(**changes),
        is_distilled=is_distilled,
    ).save_pretrained(folder)
    return folder


class Flux1Schedule(Flux2Policy):
    def dynamic_shift(self, num_steps, size):
        return resolution_dependent_shift((size[0] // CELL) * (size[1] // CELL), {})


def latents(noise, size):
    return noise.mT.unflatten(2, (size[0] // CELL, size[1] // CELL))


MISTAKES = {
    "sign": mistakes.wrong_sign(Flux2Policy),
    "level": mistakes.told(Flux2Policy, lambda sigma: 1000 * sigma),
    "schedule": Flux1Schedule,
    "packing": mistakes.another_packing(Flux2Policy),
    "statistics": mistakes.without_statistics(Flux2Policy),
    "padding": mistakes.reading(Flux2Policy, lambda text: text.each(lambda rows: rows[:, :40])),
}
"""Of klein and dev alike."""

CASE = Case(
    Flux2Policy,
    write,
    MISTAKES | {"guidance": mistakes.pipelines_scale(Flux2Policy)},
    refused={"exact_conditioning": (True, "false")},
    latents=latents,
)
