"""Wan 2.1 and 2.2's model of 5 B: clips, and pictures, which are clips of one frame.

Source: diffusers' WanTransformer3DModel, AutoencoderKLWan and WanPipeline; names of single files:
github.com/Wan-Video/Wan2.1, wan/modules/model.py.
"""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import diffusers
import torch
from jaxtyping import Float
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torch.nn import functional

from srpo_lightning import flow
from srpo_lightning.batch import Size, Text
from srpo_lightning.draws import Draws
from srpo_lightning.encoding import Encoder, Encoding
from srpo_lightning.files.pretrained import read_json
from srpo_lightning.picture_statistics import evenly
from srpo_lightning.policies.clips import ClipVAE, FrameChoice, chosen_frames
from srpo_lightning.policies.family import Images, Latents
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.policies.geometries import UMT5_XXL, WAN_VAE, WAN_VAE_FINE
from srpo_lightning.policies.single_file import SingleFile
from srpo_lightning.policies.text_encoder import PipelineTextEncoder

NUM_TIMES = 1000
STRIDE = 4
"""Frames that a latent frame stands for, but for the first, which is one."""


class WanTextEncoder(PipelineTextEncoder):
    """UMT5's rows of each prompt; the model attends to zeros behind them."""

    tokenizer_classes: ClassVar = {"tokenizer": "T5TokenizerFast"}
    model_classes: ClassVar = {"text_encoder": "UMT5EncoderModel"}
    counting, quantized = "tokenizer", "text_encoder"
    whole_layers = ("wo",)  # transformers casts its input to the dtype of its weight
    ragged = frozenset({"prompt_embeds"})
    negative = ""

    @classmethod
    def shapes_of(cls, pretrained: str, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """`prompt_embeds` [T, D]."""
        return {"prompt_embeds": (max_sequence_length, read_json(pretrained, "text_encoder", "config.json")["d_model"])}

    def templated(self, prompt: str) -> str:
        """With broken encodings mended, HTML's entities read twice and white space as single blanks."""
        import ftfy  # only what encodes texts needs it

        return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()

    def features(self, prompts: list[str], models: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """As WanPipeline.encode_prompt computes them, without the zeros."""
        texts = [self.templated(prompt) for prompt in prompts]
        tokens = self.padded("tokenizer", texts, self.max_sequence_length)
        rows = models["text_encoder"](tokens.input_ids, tokens.attention_mask).last_hidden_state
        return [{"prompt_embeds": own[:n]} for own, n in zip(rows, tokens.attention_mask.sum(1), strict=True)]


def _published(shift: float, vae: dict[str, Any], **transformer: Any) -> dict[str, dict[str, Any]]:
    return {
        "transformer/config.json": {"_class_name": "WanTransformer3DModel", **transformer},
        "vae/config.json": vae,
        "scheduler/scheduler_config.json": {
            "_class_name": "UniPCMultistepScheduler",
            "flow_shift": shift,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        },
        "text_encoder/config.json": UMT5_XXL,
        "tokenizer/tokenizer_config.json": {"model_max_length": 512},
    }


class WanPolicy(FlowPolicy):
    """Wan.

    Args:
        num_frames: number of frames of a clip, one more than a multiple of four; 1 draws pictures.
        rewarded_frames: frames of a clip that the reward sees. Of one that scores pictures their mean counts; one that
            reads clips gets them together. With even they lie from the first to the last at equal distances, with first
            at the beginning, and with random they are drawn for each micro-batch. What lies behind the last of them is
            not decoded.
        num_rewarded_frames: number of these frames.
    """

    transformer_class, pipeline_class, vae_class = "WanTransformer3DModel", "WanPipeline", "AutoencoderKLWan"
    text_encoder = WanTextEncoder
    pipeline_picture, pipeline_clip = "frames[0][0]", "frames[0]"
    shifts_twice = True
    comfy_has_original_names = True
    tied = ("in_channels", "text_dim")
    hub_tag = "wan"
    published: ClassVar = {
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _published(
            3.0, WAN_VAE, num_attention_heads=12, ffn_dim=8960, num_layers=30
        ),
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": _published(3.0, WAN_VAE),
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _published(
            5.0, WAN_VAE_FINE, num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48
        ),
    }

    def __init__(
        self,
        *args: Any,
        num_frames: PositiveInt = 1,
        rewarded_frames: FrameChoice = "even",
        num_rewarded_frames: PositiveInt = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if num_frames % STRIDE != 1:
            nearest = (num_frames - 1) // STRIDE * STRIDE + 1
            raise ValueError(
                f"num_frames is {num_frames}, and a clip has one more than a multiple of {STRIDE} frames: set it to "
                f"{nearest} or {nearest + STRIDE}"
            )
        if self.resolution_shift is not None:
            raise ValueError(
                f"resolution_shift is {str(self.resolution_shift).lower()}, but the schedulers of Wan have one shift "
                "for every size: set it to null"
            )
        self.num_frames = num_frames
        self.rewarded_frames, self.num_rewarded_frames = rewarded_frames, num_rewarded_frames

    @property
    def cell(self) -> int:  # type: ignore[override]  # a constant of other families
        """Two of the VAE's, which are 8 pixels wide, and 16 in the model of 5 B."""
        return 2 * self.factor

    @cached_property
    def factor(self) -> int:
        """Pixels of a side that one latent stands for."""
        return int(read_json(self.pretrained, "vae", "config.json").get("scale_factor_spatial", 8))

    @cached_property
    def text_rows(self) -> int:
        """Rows that every text has in the transformer, zeros behind its own included."""
        return self.text_encoder.longest(self.pretrained)

    def network(self, x: Latents, sigma: Tensor, text: Text, size: Size, told: list[Tensor]) -> Latents:
        """The level is told in thousandths; text is filled up with zeros to the length that training had."""
        rows = text.tensors["prompt_embeds"]
        padding = self.text_rows - rows.shape[1]
        velocity: Tensor = self.transformer(
            hidden_states=x,
            timestep=NUM_TIMES * sigma,
            encoder_hidden_states=functional.pad(rows, (0, 0, 0, padding)),
            return_dict=False,
        )[0]
        return velocity

    def latent_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """(c, T, h, w), T latent frames."""
        height, width = size or self.size
        channels = int(self.configs["transformer"].get("in_channels", 16))
        return channels, 1 + self.num_frames // STRIDE, height // self.factor, width // self.factor

    def num_tokens(self, size: Size) -> int:
        """Of all latent frames."""
        return super().num_tokens(size) * (1 + self.num_frames // STRIDE)

    def encoder(self, wanted: Encoding) -> Encoder:
        """Of texts, and of clips of as many frames."""
        return super().encoder(wanted)._replace(num_frames=self.num_frames)

    def read_vae(self, dtype: torch.dtype) -> ClipVAE:
        """The VAE with its weights."""
        return ClipVAE(super().read_vae(dtype))

    def to_vae(self, vae: ClipVAE, latents: Latents, size: Size) -> Tensor:
        """With the VAE's deviations and means, [B, c, T, h, w]."""
        return latents * vae.std + vae.mean

    def from_vae(self, vae: ClipVAE, z: Tensor) -> Latents:
        """Of pictures [B, c, h, w] or clips [B, c, T, h, w], normalised."""
        return ((z[:, :, None] if z.ndim == 4 else z) - vae.mean) / vae.std

    def decode(self, latents: Latents, size: Size | None = None) -> Float[Tensor, "B 3 *F H W"]:
        """Clean latents to clips [B, 3, F, H, W] in [0, 1], or to pictures where num_frames is 1; with gradient."""
        frames = self.frames(latents, range(self.num_frames))
        return frames[0] if self.num_frames == 1 else torch.stack(frames, dim=2)

    def rewarded_pictures(self, latents: Latents, size: Size | None, draws: Draws) -> list[Images]:
        """The frames that are chosen, decoded up to the last of them."""
        wanted = chosen_frames(self.rewarded_frames, self.num_rewarded_frames, self.num_frames, draws)
        return self.frames(latents, wanted)

    @property
    def shown_frames(self) -> Sequence[int]:
        """Those that training shows, where it does not draw them; else as many at equal distances."""
        if self.rewarded_frames == "first":
            return range(min(self.num_rewarded_frames, self.num_frames))
        return evenly(self.num_rewarded_frames, self.num_frames)

    def frames(self, latents: Latents, wanted: Sequence[int]) -> list[Images]:
        """Frames of clean latents in [0, 1], with gradient.

        Args:
            latents: latents [B, c, T, h, w].
            wanted: numbers of the frames.
        """
        z = self.to_vae(self.vae, latents, self.size).to(self.vae_dtype)
        return [(frame.to(latents.dtype) / 2 + 0.5).clamp(0, 1) for frame in self.vae.frames(z, wanted)]

    @property
    def is_multistep(self) -> bool:
        """Whether the pipeline draws by UniPC, as published, instead of Euler's steps."""
        return self.configs["scheduler"].get("_class_name") == "UniPCMultistepScheduler"

    def shift_for(self, num_steps: int, size: Size) -> float:
        """The scheduler's, which has another name in UniPC's configuration."""
        scheduler = self.configs["scheduler"]
        return float(scheduler["flow_shift"] if self.is_multistep else scheduler["shift"])

    def schedule(self, num_steps: int, size: Size) -> Float[Tensor, " N"]:
        """Euler's, shifted twice; of UniPC those of `num_steps + 1` without the last above 0."""
        if not self.is_multistep:
            return super().schedule(num_steps, size)
        even = torch.linspace(1, 1 / NUM_TIMES, num_steps + 1, dtype=torch.float64)
        even[-1] = 0
        return flow.shift_sigma(even, self.shift_for(num_steps, size))

    def integrate(
        self, velocity: Callable[[Tensor, Tensor], Tensor], noise: Latents, num_steps: int, size: Size | None = None
    ) -> Latents:
        """By the pipeline's scheduler (UniPC: arXiv 2302.04867), which tells the model whole thousandths."""
        if not self.is_multistep:
            return super().integrate(velocity, noise, num_steps, size)
        scheduler: Any = diffusers.UniPCMultistepScheduler.from_config(self.configs["scheduler"])
        scheduler.set_timesteps(num_steps, device=noise.device)
        x = noise
        for time in scheduler.timesteps:
            level = (time / NUM_TIMES).to(x).expand(len(x))
            x = scheduler.step(velocity(x, level), time, x, return_dict=False)[0]
        return x

    def pipeline_noise(self, generator: torch.Generator, dtype: torch.dtype) -> Latents:
        """In float32 always."""
        return torch.randn(1, *self.latent_shape(), generator=generator)

    def pipeline_arguments(self, guidance: float, max_sequence_length: int) -> Mapping[str, Any]:
        """As many frames, each as a picture; texts are filled up with zeros as far as `network` does it."""
        common = super().pipeline_arguments(guidance, self.text_rows)
        return {**common, "num_frames": self.num_frames, "output_type": "pil"}

    single_file = SingleFile(
        outer={
            "patch_embedding": ["patch_embedding"],
            "text_embedding.0": ["condition_embedder.text_embedder.linear_1"],
            "text_embedding.2": ["condition_embedder.text_embedder.linear_2"],
            "time_embedding.0": ["condition_embedder.time_embedder.linear_1"],
            "time_embedding.2": ["condition_embedder.time_embedder.linear_2"],
            "time_projection.1": ["condition_embedder.time_proj"],
            "head.head": ["proj_out"],
            "head.modulation": ["scale_shift_table"],
        },
        blocks={
            "blocks": (
                "blocks",
                {"modulation": ["scale_shift_table"], "norm3": ["norm2"]}
                | {"ffn.0": ["ffn.net.0.proj"], "ffn.2": ["ffn.net.2"]}
                | {
                    f"{theirs}.{layer}": [f"{ours}.{own}"]
                    for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
                    for layer, own in (
                        *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
                        *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
                    )
                },
            )
        },
    )
