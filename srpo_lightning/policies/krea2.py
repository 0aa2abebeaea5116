"""Krea 2, Raw and Turbo, and every model in their diffusers layout.

Source: diffusers' Krea2Transformer2DModel and Krea2Pipeline; names of single files: those of krea/Krea-2-Raw, as
`convert_krea2_transformer_checkpoint_to_diffusers` of diffusers reads them.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from srpo_lightning.batch import Size, Text
from srpo_lightning.files.pretrained import read_json
from srpo_lightning.policies.family import Latents
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.policies.geometries import QWEN3_VL_4B
from srpo_lightning.policies.packing import image_ids
from srpo_lightning.policies.per_channel_vae import PerChannelFamily
from srpo_lightning.policies.qwen_image import BEFORE, BEHIND, NUM_BEFORE, QwenImageTextEncoder
from srpo_lightning.policies.single_file import SingleFile

NUM_BEHIND = 5
"""Tokens of the template's end."""

LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""Of Qwen3-VL, where model_index.json names none."""

DISTILLED_MU = 1.15
"""The logarithm of the shift at every size, of models that were distilled to few steps."""


class Krea2TextEncoder(QwenImageTextEncoder):
    """Several layers of Qwen3-VL, side by side for each token of a prompt and of the template's end."""

    model_classes: ClassVar = {"text_encoder": "Qwen3VLModel"}
    unread: ClassVar = {"text_encoder": ("lm_head.",)}
    negative = ""

    @classmethod
    def shapes_of(cls, pretrained: str, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """`prompt_embeds` [T, layers, D]."""
        width = read_json(pretrained, "text_encoder", "config.json")["text_config"]["hidden_size"]
        return {"prompt_embeds": (max_sequence_length, len(cls.layers_read(pretrained)), width)}

    @classmethod
    def layers_read(cls, pretrained: str) -> tuple[int, ...]:
        """Those that model_index.json names."""
        return tuple(read_json(pretrained, "", "model_index.json").get("text_encoder_select_layers") or LAYERS)

    def features(self, prompts: list[str], models: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """As Krea2Pipeline.encode_prompt computes them, with padding between the prompt and the template's end."""
        length = self.max_sequence_length + NUM_BEFORE - NUM_BEHIND
        begun = self.padded("tokenizer", [BEFORE + prompt for prompt in prompts], length)
        ended = self.padded("tokenizer", [BEHIND] * len(prompts), NUM_BEHIND)
        ids, mask = (torch.cat([begun[name], ended[name]], dim=1) for name in ("input_ids", "attention_mask"))
        positions = (mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        states = models["text_encoder"](
            ids, attention_mask=mask.bool(), position_ids=positions, output_hidden_states=True
        ).hidden_states
        chosen = torch.stack([states[layer] for layer in self.layers_read(self.pretrained)], dim=2)
        parts = zip(chosen[:, NUM_BEFORE:], mask[:, NUM_BEFORE:].bool(), strict=True)
        return [{"prompt_embeds": rows[own]} for rows, own in parts]


class Krea2Policy(PerChannelFamily, FlowPolicy):
    """Krea 2."""

    transformer_class, pipeline_class = "Krea2Transformer2DModel", "Krea2Pipeline"
    text_encoder = Krea2TextEncoder
    masks_text = True
    tied = ("in_channels", "text_hidden_dim", "num_text_layers")
    hub_tag = "krea-2"
    published: ClassVar = {
        "krea/Krea-2-Raw": {
            "model_index.json": {"is_distilled": False, "text_encoder_select_layers": LAYERS},
            "transformer/config.json": {"_class_name": "Krea2Transformer2DModel", "in_channels": 64},
            "vae/config.json": {"_class_name": "AutoencoderKLQwenImage"},
            "scheduler/scheduler_config.json": {"use_dynamic_shifting": True, "max_image_seq_len": 6400},
            "text_encoder/config.json": QWEN3_VL_4B,
            "tokenizer/tokenizer_config.json": {"model_max_length": 262144},
        }
    }

    def network(self, x: Latents, sigma: Tensor, text: Text, size: Size, told: list[Tensor]) -> Latents:
        """Text has the position 0; attention leaves its padding out."""
        rows, ids = text.tensors["prompt_embeds"], image_ids(size, x)
        velocity: Tensor = self.transformer(
            hidden_states=x,
            encoder_hidden_states=rows,
            timestep=sigma,
            position_ids=torch.cat([ids.new_zeros(rows.shape[1], 3), ids]),
            encoder_attention_mask=text.mask("prompt_embeds"),
            return_dict=False,
        )[0]
        return velocity

    def dynamic_shift(self, num_steps: int, size: Size) -> float:
        """Of a distilled model, as Turbo is, one for all sizes."""
        return math.exp(DISTILLED_MU) if self.is_distilled else super().dynamic_shift(num_steps, size)

    def pipeline_arguments(self, guidance: float, max_sequence_length: int) -> Mapping[str, Any]:
        """The pipeline counts guidance from 0, which is none."""
        return super().pipeline_arguments(guidance - 1, max_sequence_length)

    single_file = SingleFile(
        outer={
            "first": ["img_in"],
            "tmlp.0": ["time_embed.linear_1"],
            "tmlp.2": ["time_embed.linear_2"],
            "tproj.1": ["time_mod_proj"],
            "txtmlp.0": ["txt_in.norm"],
            "txtmlp.1": ["txt_in.linear_1"],
            "txtmlp.3": ["txt_in.linear_2"],
            "txtfusion.projector": ["text_fusion.projector"],
            "last.norm": ["final_layer.norm"],
            "last.linear": ["final_layer.linear"],
            "last.modulation.lin": ["final_layer.scale_shift_table"],
        },
        blocks={
            ours: (
                theirs,
                {
                    "mod.lin": ["scale_shift_table"],
                    "prenorm": ["norm1"],
                    "postnorm": ["norm2"],
                    "attn.wq": ["attn.to_q"],
                    "attn.wk": ["attn.to_k"],
                    "attn.wv": ["attn.to_v"],
                    "attn.wo": ["attn.to_out.0"],
                    "attn.gate": ["attn.to_gate"],
                    "attn.qknorm.qnorm": ["attn.norm_q"],
                    "attn.qknorm.knorm": ["attn.norm_k"],
                    "mlp.gate": ["ff.gate"],
                    "mlp.up": ["ff.up"],
                    "mlp.down": ["ff.down"],
                },
            )
            for ours, theirs in {
                "transformer_blocks": "blocks",
                "text_fusion.layerwise_blocks": "txtfusion.layerwise_blocks",
                "text_fusion.refiner_blocks": "txtfusion.refiner_blocks",
            }.items()
        },
        scales=("norm", "txtmlp.0"),
        flat=(".mod.lin",),
    )
