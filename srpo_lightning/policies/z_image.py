"""Z-Image, and every model in its diffusers layout.

Source: diffusers' ZImageTransformer2DModel and ZImagePipeline; names of single files: github.com/Tongyi-MAI/Z-Image, as
`convert_z_image_transformer_checkpoint_to_diffusers` of diffusers reads them.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from srpo_lightning.batch import Size, Text
from srpo_lightning.files.pretrained import read_json
from srpo_lightning.policies.family import Latents, SpatialFamily
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.policies.geometries import QWEN3_4B, kl_vae
from srpo_lightning.policies.single_file import SingleFile
from srpo_lightning.policies.text_encoder import PipelineTextEncoder


class ZImageTextEncoder(PipelineTextEncoder):
    """The last layer but one of Qwen3, of each prompt's own tokens."""

    tokenizer_classes: ClassVar = {"tokenizer": "Qwen2Tokenizer"}
    model_classes: ClassVar = {"text_encoder": "Qwen3Model"}
    counting, quantized = "tokenizer", "text_encoder"
    unread: ClassVar = {"text_encoder": ("lm_head.",)}
    ragged = frozenset({"prompt_embeds"})
    negative = ""

    @classmethod
    def shapes_of(cls, pretrained: str, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """`prompt_embeds` [T, D]."""
        width = read_json(pretrained, "text_encoder", "config.json")["hidden_size"]
        return {"prompt_embeds": (max_sequence_length, width)}

    def templated(self, prompt: str) -> str:
        """As a user's turn, before an answer that may begin with thoughts."""
        turns = [{"role": "user", "content": prompt}]
        text: str = self.tokenizers["tokenizer"].apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return text

    def features(self, prompts: list[str], models: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """As ZImagePipeline.encode_prompt computes them."""
        texts = [self.templated(prompt) for prompt in prompts]
        tokens = self.padded("tokenizer", texts, self.max_sequence_length)
        mask = tokens.attention_mask.bool()
        states = models["text_encoder"](tokens.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return [{"prompt_embeds": rows[own]} for rows, own in zip(states[-2], mask, strict=True)]


class ZImagePolicy(SpatialFamily, FlowPolicy):
    """Z-Image."""

    transformer_class, pipeline_class = "ZImageTransformer2DModel", "ZImagePipeline"
    text_encoder = ZImageTextEncoder
    masks_text = True
    tied = ("in_channels", "cap_feat_dim")
    hub_tag = "z-image"
    published: ClassVar = {
        "Tongyi-MAI/Z-Image": {
            "transformer/config.json": {"_class_name": "ZImageTransformer2DModel", "in_channels": 16},
            "vae/config.json": kl_vae(0.3611, 0.1159),
            "scheduler/scheduler_config.json": {"shift": 6.0},
            "text_encoder/config.json": QWEN3_4B,
            "tokenizer/tokenizer_config.json": {"model_max_length": 131072},
        }
    }

    def network(self, x: Latents, sigma: Tensor, text: Text, size: Size, told: list[Tensor]) -> Latents:
        """The transformer is told how clean the latents are, and predicts the way to the picture, of one frame.

        In thousandths, as the pipeline counts: 1 - sigma is rounded otherwise, by 3e-8, which pictures show at 3e-5.
        """
        clean = (1000 - 1000 * sigma) / 1000
        predicted = self.transformer(list(x[:, :, None]), clean, text.rows("prompt_embeds"), return_dict=False)[0]
        return -torch.stack(predicted)[:, :, 0]

    def pipeline_noise(self, generator: torch.Generator, dtype: torch.dtype) -> Latents:
        """In float32 always."""
        return super().pipeline_noise(generator, torch.float32)

    def pipeline_arguments(self, guidance: float, max_sequence_length: int) -> Mapping[str, Any]:
        """The pipeline counts guidance from 0, which is none."""
        return super().pipeline_arguments(guidance - 1, max_sequence_length)

    single_file = SingleFile(
        outer={
            "x_embedder": ["all_x_embedder.2-1"],
            "t_embedder.mlp.0": ["t_embedder.mlp.0"],
            "t_embedder.mlp.2": ["t_embedder.mlp.2"],
            "cap_embedder.0": ["cap_embedder.0"],
            "cap_embedder.1": ["cap_embedder.1"],
            "x_pad_token": ["x_pad_token"],
            "cap_pad_token": ["cap_pad_token"],
            "final_layer.linear": ["all_final_layer.2-1.linear"],
            "final_layer.adaLN_modulation.1": ["all_final_layer.2-1.adaLN_modulation.1"],
        },
        blocks={
            name: (
                name,
                {
                    "attention.qkv": ["attention.to_q", "attention.to_k", "attention.to_v"],
                    "attention.out": ["attention.to_out.0"],
                    "attention.q_norm": ["attention.norm_q"],
                    "attention.k_norm": ["attention.norm_k"],
                }
                | {
                    own: [own]
                    for own in (
                        *("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "adaLN_modulation.0"),
                        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
                    )
                },
            )
            for name in ("noise_refiner", "context_refiner", "layers")
        },
    )
