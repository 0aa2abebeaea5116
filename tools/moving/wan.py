"""The clip model: a small Wan and its UMT5, trained together on cached latents."""

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from srpo_lightning import flow
from tools.emoji.flux import draw_sigmas, t5_settings
from tools.emoji.tokenizers import MAX_TOKENS
from tools.emoji.training import Trainee

from .captions import Captions
from .vae import CHANNELS

WIDTH = 192
NUM_TIMES = 1000


def new_transformer() -> WanTransformer3DModel:
    """An untrained Wan of 3.5 M parameters, its output zero."""
    transformer = WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=WIDTH // 6,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=128,
        ffn_dim=3 * WIDTH,
        num_layers=6,
        rope_max_seq_len=64,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    transformer.set_attention_backend("_native_math")
    return transformer


def new_text_encoder(tokenizer: T5TokenizerFast) -> UMT5EncoderModel:
    """An untrained UMT5 encoder of two layers."""
    return UMT5EncoderModel(UMT5Config(**t5_settings(tokenizer)))


class TextAndClip(nn.Module):
    """What is trained: UMT5 and the transformer, from tokens to velocity."""

    def __init__(self, transformer: WanTransformer3DModel, text: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.text = transformer, text

    def forward(self, x: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Velocity [B, C, T, 8, 8] at `x`, noise level [B], token ids and mask [B, MAX_TOKENS]."""
        rows = self.text(ids, mask).last_hidden_state
        velocity: Tensor = self.transformer(
            hidden_states=x,
            timestep=NUM_TIMES * sigma,
            encoder_hidden_states=rows * mask[..., None].to(rows.dtype),  # zeros behind a text, as the pipeline has
            return_dict=False,
        )[0]
        return velocity.float()


class WanTraining(Trainee):
    """Flow matching.

    Args:
        latents: clean, [concept * style * motion * poses, C, T, 8, 8].
        num_poses: number of clips that show the same, one after the other.
        captions: texts of the clips.
        tokenizer: UMT5's.
    """

    def __init__(
        self,
        net: TextAndClip,
        latents: Tensor,
        num_poses: int,
        captions: Captions,
        tokenizer: T5TokenizerFast,
        steps: int,
        seed: int,
        batch: int = 64,
        muon_lr: float = 3e-3,
    ) -> None:
        super().__init__(net, steps, seed, muon_lr=muon_lr, adam_lr=muon_lr / 3)
        self.latents, self.num_poses, self.captions, self.batch = latents, num_poses, captions, batch
        tokens = tokenizer(
            captions.texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        self.ids, self.mask = tokens.input_ids, tokens.attention_mask

    def loss(self, draw: torch.Generator) -> dict[str, Tensor]:
        """Mean squared error of the velocity."""
        rows = torch.randint(len(self.latents), (self.batch,), generator=draw)
        texts = self.captions.draw(rows // self.num_poses, draw)
        x0, sigma = self.latents[rows].float(), draw_sigmas(self.batch, draw)
        noise = torch.randn(x0.shape, generator=draw)
        velocity = self.net(flow.inject(x0, noise, sigma), sigma, self.ids[texts], self.mask[texts])
        return {"loss": F.mse_loss(velocity, noise - x0)}
