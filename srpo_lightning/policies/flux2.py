"""FLUX.2: dev, klein and klein-base in both sizes, and every model in their diffusers layout.

Source: diffusers' Flux2Transformer2DModel, Flux2KleinPipeline and Flux2Pipeline; names of single files:
github.com/black-forest-labs/flux2, src/flux2/model.py.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from srpo_lightning.batch import Size, Text
from srpo_lightning.files.pretrained import read_json
from srpo_lightning.policies.family import Latents, PackedFamily
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.policies.geometries import MISTRAL_SMALL, QWEN3_4B, QWEN3_8B
from srpo_lightning.policies.packing import CELL, image_ids, pack, unpack
from srpo_lightning.policies.single_file import SingleFile
from srpo_lightning.policies.text_encoder import PipelineTextEncoder


class KleinTextEncoder(PipelineTextEncoder):
    """Three layers of Qwen3, side by side for each token; the model attends to padding."""

    tokenizer_classes: ClassVar = {"tokenizer": "Qwen2Tokenizer"}
    model_classes: ClassVar = {"text_encoder": "Qwen3Model"}
    counting, quantized = "tokenizer", "text_encoder"
    unread: ClassVar = {"text_encoder": ("lm_head.",)}
    negative: str | None = ""
    layers: ClassVar = (9, 18, 27)

    @classmethod
    def shapes_of(cls, pretrained: str, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """`prompt_embeds` [T, D]."""
        config = read_json(pretrained, "text_encoder", "config.json")
        width = config.get("text_config", config)["hidden_size"]
        return {"prompt_embeds": (max_sequence_length, len(cls.layers) * width)}

    @classmethod
    def layers_read(cls, pretrained: str) -> tuple[int, ...]:  # noqa: ARG003  # Krea 2's say so in a file
        """Three."""
        return cls.layers

    def templated(self, prompt: str) -> str:
        """As a user's turn, before an answer whose thoughts are empty."""
        turns = [{"role": "user", "content": prompt}]
        text: str = self.tokenizers["tokenizer"].apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return text

    def num_tokens(self, prompts: list[str]) -> list[int]:
        """With the template's, which holds every special token."""
        texts = [self.templated(prompt) for prompt in prompts]
        return [len(ids) for ids in self.tokenizers["tokenizer"](texts, add_special_tokens=False).input_ids]

    def features(self, prompts: list[str], models: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """As `encode_prompt` of the pipeline computes them."""
        texts = [self.templated(prompt) for prompt in prompts]
        tokens = self.padded("tokenizer", texts, self.max_sequence_length, add_special_tokens=False)
        states = models["text_encoder"](
            tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        chosen = torch.cat([states[layer] for layer in self.layers], dim=-1)
        return [{"prompt_embeds": rows} for rows in chosen]


class DevTextEncoder(KleinTextEncoder):
    """Three layers of Mistral Small 3, likewise, without the head that would turn the last one into logits."""

    tokenizer_classes: ClassVar = {"tokenizer": "TokenizersBackend"}  # as the folder's PixtralProcessor reads its own
    model_classes: ClassVar = {"text_encoder": "Mistral3Model"}
    unread: ClassVar = {"text_encoder": ("lm_head.", "language_model.lm_head.")}
    negative = None
    layers: ClassVar = (10, 20, 30)

    def templated(self, prompt: str) -> str:
        """As a user's turn behind the pipeline's system message; "[IMG]" would stand for a picture."""
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE  # only this model's encoder needs it

        turns = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("system", SYSTEM_MESSAGE), ("user", prompt.replace("[IMG]", "")))
        ]
        text: str = self.tokenizers["tokenizer"].apply_chat_template(turns, tokenize=False)
        return text


def _published(layers: tuple[int, int], heads: int, text: dict[str, Any]) -> dict[str, dict[str, Any]]:
    width = text.get("text_config", text)["hidden_size"]
    return {
        "model_index.json": {"is_distilled": False},
        "transformer/config.json": {
            "_class_name": "Flux2Transformer2DModel",
            "in_channels": 128,
            "num_layers": layers[0],
            "num_single_layers": layers[1],
            "num_attention_heads": heads,
            "joint_attention_dim": 3 * width,
            "guidance_embeds": text is MISTRAL_SMALL,
        },
        "vae/config.json": {"_class_name": "AutoencoderKLFlux2"},
        "scheduler/scheduler_config.json": {"shift": 3.0, "use_dynamic_shifting": True},
        "text_encoder/config.json": text,
        "tokenizer/tokenizer_config.json": {"model_max_length": 131072},
    }


class Flux2Policy(PackedFamily, FlowPolicy):
    """FLUX.2."""

    transformer_class, vae_class = "Flux2Transformer2DModel", "AutoencoderKLFlux2"
    tied = ("in_channels", "joint_attention_dim", "guidance_embeds")
    hub_tag = "flux-2"
    published: ClassVar = {
        "black-forest-labs/FLUX.2-klein-base-4B": _published((5, 20), 24, QWEN3_4B),
        "black-forest-labs/FLUX.2-klein-base-9B": _published((8, 24), 32, QWEN3_8B),
        "black-forest-labs/FLUX.2-dev": _published((8, 48), 48, MISTRAL_SMALL),
    }

    @property
    def pipeline_class(self) -> str:  # type: ignore[override]  # a constant of other families
        """Dev's, whose guidance is embedded, or klein's."""
        return "Flux2Pipeline" if self.guided else "Flux2KleinPipeline"

    @property
    def text_encoder(self) -> type[PipelineTextEncoder]:  # type: ignore[override]  # a constant of other families
        """Dev's or klein's."""
        return DevTextEncoder if self.guided else KleinTextEncoder

    @property
    def has_negative(self) -> bool:  # type: ignore[override]  # a constant of other policies
        """Of klein-base alone: the pipeline of a distilled model ignores guidance."""
        return super().has_negative and not self.is_distilled

    def network(self, x: Latents, sigma: Tensor, text: Text, size: Size, told: list[Tensor]) -> Latents:
        """Level and guidance are told as they are. Positions are integers: bfloat16 does not count beyond 256."""
        rows = text.tensors["prompt_embeds"]
        text_ids = functional.pad(torch.arange(rows.shape[1], device=x.device)[:, None], (3, 0))
        velocity: Tensor = self.transformer(
            hidden_states=x,
            timestep=sigma,
            guidance=told[1] if self.guided else None,
            encoder_hidden_states=rows,
            txt_ids=text_ids[None],
            img_ids=functional.pad(image_ids(size, text_ids), (0, 1))[None],
            return_dict=False,
        )[0]
        return velocity

    def to_vae(self, vae: Any, latents: Latents, size: Size) -> Tensor:
        """With the running mean and deviation of each channel of a token, then unpacked."""
        mean, std = _statistics(vae, latents)
        return unpack(latents * std + mean, size)

    def from_vae(self, vae: Any, z: Tensor) -> Latents:
        """Packed, then normalised."""
        mean, std = _statistics(vae, z)
        return (pack(z) - mean) / std

    def pipeline_noise(self, generator: torch.Generator, dtype: torch.dtype) -> Latents:
        """Drawn as packed channels of rows and columns."""
        height, width = (side // CELL for side in self.size)
        channels = 4 * self.latent_channels
        noise = torch.randn(1, channels, height, width, generator=generator, dtype=dtype)
        return noise.flatten(2).mT.contiguous().float()

    def dynamic_shift(self, num_steps: int, size: Size) -> float:
        """The exponential of a line in the number of steps, whose ends are lines in the number of tokens.

        Source: `compute_empirical_mu` of diffusers' pipeline_flux2.py.
        """
        tokens = (size[0] // CELL) * (size[1] // CELL)
        many, few = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333  # at 200 and at 10 steps
        return math.exp(many if tokens > 4300 else many + (num_steps - 200) * (many - few) / 190)

    single_file = SingleFile(
        outer={
            "img_in": ["x_embedder"],
            "txt_in": ["context_embedder"],
            "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
            "time_in.out_layer": ["time_guidance_embed.timestep_embedder.linear_2"],
            "guidance_in.in_layer": ["time_guidance_embed.guidance_embedder.linear_1"],
            "guidance_in.out_layer": ["time_guidance_embed.guidance_embedder.linear_2"],
            "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
            "double_stream_modulation_txt.lin": ["double_stream_modulation_txt.linear"],
            "single_stream_modulation.lin": ["single_stream_modulation.linear"],
            "final_layer.adaLN_modulation.1": ["norm_out.linear"],
            "final_layer.linear": ["proj_out"],
        },
        blocks={
            "transformer_blocks": (
                "double_blocks",
                {
                    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
                    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
                    "img_attn.norm.query_norm": ["attn.norm_q"],
                    "img_attn.norm.key_norm": ["attn.norm_k"],
                    "txt_attn.norm.query_norm": ["attn.norm_added_q"],
                    "txt_attn.norm.key_norm": ["attn.norm_added_k"],
                    "img_attn.proj": ["attn.to_out.0"],
                    "txt_attn.proj": ["attn.to_add_out"],
                    "img_mlp.0": ["ff.linear_in"],
                    "img_mlp.2": ["ff.linear_out"],
                    "txt_mlp.0": ["ff_context.linear_in"],
                    "txt_mlp.2": ["ff_context.linear_out"],
                },
            ),
            "single_transformer_blocks": (
                "single_blocks",
                {
                    "linear1": ["attn.to_qkv_mlp_proj"],
                    "linear2": ["attn.to_out"],
                    "norm.query_norm": ["attn.norm_q"],
                    "norm.key_norm": ["attn.norm_k"],
                },
            ),
        },
        swapped=("final_layer.adaLN_modulation.1.",),
        scales=("_norm",),
    )


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the channels of a token, [4 c] each."""
    norm = vae.bn
    return norm.running_mean.to(like), torch.sqrt(norm.running_var.to(like) + norm.eps)
