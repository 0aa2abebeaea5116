"""FLUX.1: dev, schnell, Krea, and every model in their diffusers layout.

Source: diffusers' FluxTransformer2DModel and FluxPipeline; names of single files: github.com/black-forest-labs/flux,
src/flux/model.py and modules/layers.py.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from srpo_lightning.batch import Size, Text
from srpo_lightning.files.pretrained import read_json
from srpo_lightning.policies.family import Latents, PackedFamily
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.policies.geometries import CLIP_L, T5_XXL, kl_vae
from srpo_lightning.policies.packing import image_ids
from srpo_lightning.policies.single_file import SingleFile
from srpo_lightning.policies.text_encoder import PipelineTextEncoder

CONVERTED_WIDTH = 3072
"""FLUX.1's, and the only one that diffusers' converter of single files knows."""


class FluxTextEncoder(PipelineTextEncoder):
    """T5's sequence and CLIP's pooled vector; the model attends to T5's padding."""

    tokenizer_classes: ClassVar = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"}
    model_classes: ClassVar = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}
    counting, quantized = "tokenizer_2", "text_encoder_2"
    whole_layers = ("wo",)  # transformers casts its input to the dtype of its weight
    unread: ClassVar = {"text_encoder": ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")}

    @classmethod
    def shapes_of(cls, pretrained: str, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """`prompt_embeds` [T, D] and `pooled_prompt_embeds` [P]."""
        t5 = read_json(pretrained, "text_encoder_2", "config.json")
        clip = read_json(pretrained, "text_encoder", "config.json")
        return {"prompt_embeds": (max_sequence_length, t5["d_model"]), "pooled_prompt_embeds": (clip["hidden_size"],)}

    def features(self, prompts: list[str], models: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """As FluxPipeline.encode_prompt computes them."""
        clip = self.padded("tokenizer", prompts, self.tokenizers["tokenizer"].model_max_length)
        t5 = self.padded("tokenizer_2", prompts, self.max_sequence_length)
        pooled = models["text_encoder"](clip.input_ids).pooler_output
        sequence = models["text_encoder_2"](t5.input_ids)[0]
        return [{"prompt_embeds": s, "pooled_prompt_embeds": p} for s, p in zip(sequence, pooled, strict=True)]


PUBLISHED: dict[str, dict[str, Any]] = {
    "transformer/config.json": {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    },
    "vae/config.json": kl_vae(0.3611, 0.1159),
    "scheduler/scheduler_config.json": {"shift": 3.0, "use_dynamic_shifting": True},
    "text_encoder/config.json": CLIP_L,
    "text_encoder_2/config.json": T5_XXL,
    "tokenizer_2/tokenizer_config.json": {"model_max_length": 512},
}


class FluxPolicy(PackedFamily, FlowPolicy):
    """FLUX.1."""

    transformer_class, pipeline_class = "FluxTransformer2DModel", "FluxPipeline"
    text_encoder = FluxTextEncoder
    num_rounded = 2  # 1000 sigma and 1000 guidance
    tied = ("in_channels", "joint_attention_dim", "pooled_projection_dim")
    hub_tag = "flux"
    published: ClassVar = {"black-forest-labs/FLUX.1-dev": PUBLISHED, "black-forest-labs/FLUX.1-Krea-dev": PUBLISHED}

    def network(self, x: Latents, sigma: Tensor, text: Text, size: Size, told: list[Tensor]) -> Latents:
        """Level and guidance are told as they are; text has the position 0."""
        velocity: Tensor = self.transformer(
            hidden_states=x,
            timestep=sigma,
            guidance=told[1] if self.guided else None,
            encoder_hidden_states=text.tensors["prompt_embeds"],
            pooled_projections=text.tensors["pooled_prompt_embeds"],
            txt_ids=x.new_zeros(text.tensors["prompt_embeds"].shape[1], 3),
            img_ids=image_ids(size, x),
            return_dict=False,
        )[0]
        return velocity

    def reads_single_file(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Of one width alone."""
        return shapes["x_embedder.bias"] == (CONVERTED_WIDTH,)

    single_file = SingleFile(
        outer={
            "img_in": ["x_embedder"],
            "txt_in": ["context_embedder"],
            "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
            "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
            "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
            "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
            "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
            "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
            "final_layer.adaLN_modulation.1": ["norm_out.linear"],
            "final_layer.linear": ["proj_out"],
        },
        blocks={
            "transformer_blocks": (
                "double_blocks",
                {
                    "img_mod.lin": ["norm1.linear"],
                    "txt_mod.lin": ["norm1_context.linear"],
                    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
                    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
                    "img_attn.norm.query_norm": ["attn.norm_q"],
                    "img_attn.norm.key_norm": ["attn.norm_k"],
                    "txt_attn.norm.query_norm": ["attn.norm_added_q"],
                    "txt_attn.norm.key_norm": ["attn.norm_added_k"],
                    "img_attn.proj": ["attn.to_out.0"],
                    "txt_attn.proj": ["attn.to_add_out"],
                    "img_mlp.0": ["ff.net.0.proj"],
                    "img_mlp.2": ["ff.net.2"],
                    "txt_mlp.0": ["ff_context.net.0.proj"],
                    "txt_mlp.2": ["ff_context.net.2"],
                },
            ),
            "single_transformer_blocks": (
                "single_blocks",
                {
                    "modulation.lin": ["norm.linear"],
                    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
                    "linear2": ["proj_out"],
                    "norm.query_norm": ["attn.norm_q"],
                    "norm.key_norm": ["attn.norm_k"],
                },
            ),
        },
        swapped=("final_layer.adaLN_modulation.1.",),
        scales=("_norm",),
    )
