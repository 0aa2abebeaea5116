"""The picture model: a small FLUX and its T5, trained together on cached latents, then guidance-distilled."""

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from srpo_lightning import flow

from .captions import STYLES, caption
from .tokenizers import MAX_TOKENS
from .training import Trainee

SHIFT = 3.0  # of the noise schedule, training and sampling
GUIDANCE = (1.0, 5.0)  # range that the distillation covers
JOINT, BARE, STYLE_ONLY = 0.55, 0.30, 0.05  # parts of the captions; the rest is empty


def new_transformer(pooled_dim: int) -> FluxTransformer2DModel:
    """An untrained FLUX transformer of 7.7 M parameters, its residual branches closed."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=192,
        pooled_projection_dim=pooled_dim,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    # As in DiT: each block starts as the identity, the output as zero.
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith((".linear", "proj_out")) and "single" not in name):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    for block in transformer.single_transformer_blocks:
        nn.init.zeros_(block.norm.linear.weight)
        nn.init.zeros_(block.norm.linear.bias)
    transformer.set_attention_backend("_native_math")
    return transformer


def t5_settings(tokenizer: T5TokenizerFast) -> dict[str, Any]:
    """The configuration of a T5 or UMT5 encoder of two layers."""
    return {
        "vocab_size": len(tokenizer),
        "d_model": 192,
        "d_kv": 32,
        "d_ff": 512,
        "num_layers": 2,
        "num_heads": 6,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }


def new_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """An untrained T5 encoder of two layers."""
    return T5EncoderModel(T5Config(**t5_settings(tokenizer)))


def pack(latents: Tensor) -> Tensor:
    """Latents [B, 16, 8, 8] as the 16 tokens of 64 numbers that FLUX reads."""
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Undo `pack`."""
    latents: Tensor = FluxPipeline._unpack_latents(packed, 64, 64, 8)
    return latents


class Prompts(NamedTuple):
    """Captions as both text encoders see them.

    Attributes:
        ids: T5's tokens [B, MAX_TOKENS], padded: FLUX reads the padding too.
        pooled: CLIP's pooled output [B, P].
    """

    ids: Tensor
    pooled: Tensor

    def at(self, rows: Tensor) -> "Prompts":
        """Some of the captions."""
        return Prompts(self.ids[rows], self.pooled[rows])


@torch.no_grad()
def read_prompts(
    captions: Iterable[str], t5: T5TokenizerFast, clip: CLIPTokenizer, text_tower: CLIPTextModel
) -> Prompts:
    """Tokenize for T5, encode with the frozen CLIP, both padded as FluxPipeline pads."""
    captions = list(captions)
    padded = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
    ids = t5(captions, **padded).input_ids
    pooled = text_tower(clip(captions, **padded).input_ids).pooler_output
    return Prompts(ids, pooled.float())


class TextAndPicture(nn.Module):
    """What is trained: T5 and the transformer, from tokens to velocity."""

    def __init__(self, transformer: FluxTransformer2DModel, t5: T5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.t5 = transformer, t5
        image_ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), torch.float32)
        self.register_buffer("image_ids", image_ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(MAX_TOKENS, 3), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, prompts: Prompts, guidance: Tensor) -> Tensor:
        """Velocity [B, 16, 64] at `x` [B, 16, 64], noise level [B], guidance [B]."""
        velocity: Tensor = self.transformer(
            hidden_states=x,
            encoder_hidden_states=self.t5(prompts.ids).last_hidden_state,
            pooled_projections=prompts.pooled,
            timestep=sigma,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            guidance=guidance,
            return_dict=False,
        )[0].float()
        return velocity


class CaptionTable(NamedTuple):
    """Every caption of the world once, and where which form lies."""

    captions: list[str]
    num_concepts: int

    @staticmethod
    def of(concepts: list[str]) -> "CaptionTable":
        """Joint captions (concept by concept), bare concepts, styles, the empty one."""
        joint = [caption(style, concept) for concept in concepts for style in STYLES]
        return CaptionTable([*joint, *concepts, *STYLES, ""], len(concepts))

    def draw(self, pictures: Tensor, draw: torch.Generator) -> Tensor:
        """A caption for each of some pictures (row = concept * num_styles + style)."""
        count, styles = self.num_concepts, len(STYLES)
        bare, style = count * styles + pictures // styles, count * (styles + 1) + pictures % styles
        choice = torch.rand(len(pictures), generator=draw)
        rows = torch.full_like(pictures, len(self.captions) - 1)
        rows = torch.where(choice < JOINT + BARE + STYLE_ONLY, style, rows)
        rows = torch.where(choice < JOINT + BARE, bare, rows)
        return torch.where(choice < JOINT, pictures, rows)


def draw_sigmas(count: int, draw: torch.Generator) -> Tensor:
    """Noise levels [B]: seven of ten logit-normal, the others uniform, then shifted as the sampler's are."""
    normal = torch.randn(count, generator=draw).sigmoid()
    flat = torch.rand(count, generator=draw)
    return flow.shift_sigma(torch.where(torch.rand(count, generator=draw) < 0.7, normal, flat), SHIFT)


class FluxTraining(Trainee):
    """Flow matching at guidance 1.

    Args:
        latents: packed and clean, [concept * style, 16, 64].
        prompts: of `table.captions`.
    """

    def __init__(
        self,
        net: TextAndPicture,
        latents: Tensor,
        prompts: Prompts,
        table: CaptionTable,
        steps: int,
        seed: int,
        batch: int = 128,
        muon_lr: float = 3e-3,
        decay: float = 0.3,
    ) -> None:
        super().__init__(net, steps, seed, muon_lr=muon_lr, adam_lr=muon_lr / 3, decay=decay)
        self.latents, self.prompts, self.table, self.batch = latents, prompts, table, batch
        net.transformer.compile()

    def loss(self, draw: torch.Generator) -> dict[str, Tensor]:
        """Mean squared error of the velocity."""
        rows = torch.randint(len(self.latents), (self.batch,), generator=draw)
        prompts = self.prompts.at(self.table.draw(rows, draw))
        x0, sigma = self.latents[rows], draw_sigmas(self.batch, draw)
        noise = torch.randn(x0.shape, generator=draw)
        velocity = self.net(flow.inject(x0, noise, sigma), sigma, prompts, torch.ones(self.batch))
        return {"loss": F.mse_loss(velocity, noise - x0)}


class GuidanceDistillation(FluxTraining):
    """Classifier-free guidance of a frozen copy, learnt into the guidance embedding.

    At guidance g the student's velocity is `empty + g (conditional - empty)` of the teacher; at 1 nothing changes.
    """

    def __init__(
        self, net: TextAndPicture, latents: Tensor, prompts: Prompts, table: CaptionTable, steps: int, seed: int
    ) -> None:
        super().__init__(net, latents, prompts, table, steps, seed, batch=96, muon_lr=1e-3, decay=0.6)
        self.frozen = [copy.deepcopy(net).requires_grad_(False)]  # in a list: not a submodule, so in no checkpoint

    def loss(self, draw: torch.Generator) -> dict[str, Tensor]:
        """Mean squared difference to the guided teacher."""
        rows = torch.randint(len(self.latents), (self.batch,), generator=draw)
        captions = self.table.draw(rows, draw)
        empty = self.prompts.at(torch.full_like(captions, len(self.table.captions) - 1))
        prompts = self.prompts.at(captions)
        x0, sigma = self.latents[rows], draw_sigmas(self.batch, draw)
        x = flow.inject(x0, torch.randn(x0.shape, generator=draw), sigma)
        low, high = GUIDANCE
        guidance = low + (high - low) * torch.rand(self.batch, generator=draw)
        with torch.no_grad():
            one = torch.ones(self.batch)
            without = self.frozen[0](x, sigma, empty, one)
            guided = without + guidance.view(-1, 1, 1) * (self.frozen[0](x, sigma, prompts, one) - without)
        return {"loss": F.mse_loss(self.net(x, sigma, prompts, guidance), guided)}


@torch.no_grad()
def sample(
    net: TextAndPicture, prompts: Prompts, guidance: float, seed: int, steps: int = 25, cfg_scale: float = 1.0
) -> Tensor:
    """Packed latents [B, 16, 64] for prompts, by Euler steps.

    Args:
        cfg_scale: above 1, true classifier-free guidance against the last of `prompts`, which is then the empty one.
    """
    count = len(prompts.ids)
    noise = torch.randn(count, 16, 64, generator=torch.Generator().manual_seed(seed))
    empty = prompts.at(torch.full((count,), count - 1))

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        embedded = torch.full((count,), guidance)
        conditional: Tensor = net(x, sigma, prompts, embedded)
        if cfg_scale == 1:
            return conditional
        without = net(x, sigma, empty, embedded)
        return without + cfg_scale * (conditional - without)

    return flow.integrate(velocity, noise, flow.schedule(steps, SHIFT))
