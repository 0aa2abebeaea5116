"""Stable Diffusion 3 and 3.5, medium and large, and every model in their diffusers layout.

Source: diffusers' SD3Transformer2DModel and StableDiffusion3Pipeline; names of single files: those of
stabilityai/stable-diffusion-3.5-medium, as `convert_sd3_transformer_checkpoint_to_diffusers` of diffusers reads them.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from srpo_lightning.batch import Size, Text
from srpo_lightning.files.pretrained import read_json
from srpo_lightning.policies import loading
from srpo_lightning.policies.family import Latents, SpatialFamily
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.policies.geometries import CLIP_G, CLIP_L, T5_XXL, kl_vae
from srpo_lightning.policies.single_file import SingleFile
from srpo_lightning.policies.text_encoder import PipelineTextEncoder


class SD3TextEncoder(PipelineTextEncoder):
    """Both CLIPs' rows side by side, then T5's, and the CLIPs' pooled vectors; the model attends to padding."""

    tokenizer_classes: ClassVar = {
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5TokenizerFast",
    }
    model_classes: ClassVar = {
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    }
    counting, quantized = "tokenizer_3", "text_encoder_3"
    whole_layers = ("wo",)  # transformers casts its input to the dtype of its weight
    most_tokens = 256
    negative = ""

    @classmethod
    def shapes_of(cls, pretrained: str, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """`prompt_embeds` [T, D], CLIP's rows among the T, and `pooled_prompt_embeds` [P]."""
        rows = read_json(pretrained, "tokenizer", "tokenizer_config.json")["model_max_length"]
        width = read_json(pretrained, "text_encoder_3", "config.json")["d_model"]
        clips = [read_json(pretrained, name, "config.json") for name in ("text_encoder", "text_encoder_2")]
        pooled = sum(clip["projection_dim"] for clip in clips)
        return {"prompt_embeds": (rows + max_sequence_length, width), "pooled_prompt_embeds": (pooled,)}

    def features(self, prompts: list[str], models: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """As StableDiffusion3Pipeline.encode_prompt computes them."""
        length = self.tokenizers["tokenizer"].model_max_length
        clips = [
            models[f"text_encoder{number}"](
                self.padded(f"tokenizer{number}", prompts, length).input_ids, output_hidden_states=True
            )
            for number in ("", "_2")
        ]
        t5 = models["text_encoder_3"](self.padded("tokenizer_3", prompts, self.max_sequence_length).input_ids)[0]
        both = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        both = functional.pad(both, (0, t5.shape[-1] - both.shape[-1]))
        pooled = torch.cat([clip.text_embeds for clip in clips], dim=-1)
        rows = torch.cat([both, t5], dim=1)
        return [{"prompt_embeds": r, "pooled_prompt_embeds": p} for r, p in zip(rows, pooled, strict=True)]


def _published(**transformer: Any) -> dict[str, dict[str, Any]]:
    shared = {"_class_name": "SD3Transformer2DModel", "in_channels": 16, "qk_norm": "rms_norm"}
    return {
        "transformer/config.json": {**shared, **transformer},
        "vae/config.json": kl_vae(1.5305, 0.0609),
        "scheduler/scheduler_config.json": {"shift": 3.0},
        "text_encoder/config.json": CLIP_L,
        "text_encoder_2/config.json": CLIP_G,
        "text_encoder_3/config.json": T5_XXL,
        "tokenizer/tokenizer_config.json": {"model_max_length": 77},
        "tokenizer_3/tokenizer_config.json": {"model_max_length": 512},
    }


class SD3Policy(SpatialFamily, FlowPolicy):
    """Stable Diffusion 3 and 3.5."""

    transformer_class, pipeline_class = "SD3Transformer2DModel", "StableDiffusion3Pipeline"
    text_encoder = SD3TextEncoder
    shifts_twice = True
    tied = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    hub_tag = "stable-diffusion-3.5"
    published: ClassVar = {
        "stabilityai/stable-diffusion-3.5-medium": _published(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=list(range(13)),
        ),
        "stabilityai/stable-diffusion-3.5-large": _published(
            num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192
        ),
    }

    def empty_transformer(self) -> Any:
        """Without the table of positions, which takes seconds and GiB to compute, and is in the file."""
        size = self.configs["transformer"].get("pos_embed_max_size", 96)
        empty = loading.empty(self.diffusers_class, self.configs["transformer"] | {"pos_embed_max_size": 1})
        empty.register_to_config(pos_embed_max_size=size)
        patches = empty.pos_embed
        patches.pos_embed_max_size = size
        patches.pos_embed = patches.pos_embed.new_empty(1, size * size, patches.pos_embed.shape[-1], device="meta")
        return empty

    def network(self, x: Latents, sigma: Tensor, text: Text, size: Size, told: list[Tensor]) -> Latents:
        """The level is told in thousandths."""
        velocity: Tensor = self.transformer(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=text.tensors["prompt_embeds"],
            pooled_projections=text.tensors["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return velocity

    @property
    def single_file(self) -> SingleFile:  # type: ignore[override]  # a constant of other families
        """Blocks of pictures and texts apart; what the last one does to the text holds its halves the other way."""
        last = self.configs["transformer"].get("num_layers", 18) - 1
        shared = {
            "attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
            "attn.ln_q": ["attn.norm_q"],
            "attn.ln_k": ["attn.norm_k"],
            "attn.proj": ["attn.to_out.0"],
            "attn2.qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
            "attn2.ln_q": ["attn2.norm_q"],
            "attn2.ln_k": ["attn2.norm_k"],
            "attn2.proj": ["attn2.to_out.0"],
            "adaLN_modulation.1": ["norm1.linear"],
            "mlp.fc1": ["ff.net.0.proj"],
            "mlp.fc2": ["ff.net.2"],
        }
        context = {
            "attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
            "attn.ln_q": ["attn.norm_added_q"],
            "attn.ln_k": ["attn.norm_added_k"],
            "attn.proj": ["attn.to_add_out"],
            "adaLN_modulation.1": ["norm1_context.linear"],
            "mlp.fc1": ["ff_context.net.0.proj"],
            "mlp.fc2": ["ff_context.net.2"],
        }
        blocks = {f"x_block.{name}": parts for name, parts in shared.items()}
        blocks |= {f"context_block.{name}": parts for name, parts in context.items()}
        return SingleFile(
            outer={
                "pos_embed": ["pos_embed.pos_embed"],
                "x_embedder.proj": ["pos_embed.proj"],
                "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
                "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
                "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
                "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
                "context_embedder": ["context_embedder"],
                "final_layer.adaLN_modulation.1": ["norm_out.linear"],
                "final_layer.linear": ["proj_out"],
            },
            blocks={"transformer_blocks": ("joint_blocks", blocks)},
            swapped=("final_layer.adaLN_modulation.1.", f"joint_blocks.{last}.context_block.adaLN_modulation.1."),
        )
