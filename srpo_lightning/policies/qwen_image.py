"""Qwen-Image, Qwen-Image-2512, and every model in their diffusers layout.

Source: diffusers' QwenImageTransformer2DModel and QwenImagePipeline, whose names original single files have too.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from srpo_lightning.batch import Size, Text
from srpo_lightning.files.pretrained import read_json
from srpo_lightning.policies.family import Latents
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.policies.geometries import QWEN2_5_VL_7B
from srpo_lightning.policies.packing import CELL
from srpo_lightning.policies.per_channel_vae import PerChannelFamily
from srpo_lightning.policies.single_file import SingleFile
from srpo_lightning.policies.text_encoder import PipelineTextEncoder

BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
BEHIND = "<|im_end|>\n<|im_start|>assistant\n"
NUM_BEFORE = 34
"""Tokens of the instruction, which are read and then left out."""


class QwenImageTextEncoder(PipelineTextEncoder):
    """The last layer of Qwen2.5-VL, of each prompt's own tokens and of the template's end."""

    tokenizer_classes: ClassVar = {"tokenizer": "Qwen2Tokenizer"}
    model_classes: ClassVar = {"text_encoder": "Qwen2_5_VLForConditionalGeneration"}
    counting, quantized = "tokenizer", "text_encoder"
    ragged = frozenset({"prompt_embeds"})
    negative = " "

    @classmethod
    def shapes_of(cls, pretrained: str, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """`prompt_embeds` [T, D]."""
        config = read_json(pretrained, "text_encoder", "config.json")
        return {"prompt_embeds": (max_sequence_length, config.get("text_config", config)["hidden_size"])}

    def templated(self, prompt: str) -> str:
        """As a user's turn behind the instruction to describe it."""
        return BEFORE + prompt + BEHIND

    def num_tokens(self, prompts: list[str]) -> list[int]:
        """Without the instruction's."""
        return [number - NUM_BEFORE for number in super().num_tokens(prompts)]

    def features(self, prompts: list[str], models: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """As QwenImagePipeline.encode_prompt computes them."""
        texts = [self.templated(prompt) for prompt in prompts]
        tokens = self.padded("tokenizer", texts, self.max_sequence_length + NUM_BEFORE, padding=True)
        states = models["text_encoder"](
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,  # nobody reads any: of all tokens they are 152,064 numbers each
        ).hidden_states[-1]
        parts = zip(states, tokens.attention_mask.bool(), strict=True)
        return [{"prompt_embeds": rows[own][NUM_BEFORE:]} for rows, own in parts]


PUBLISHED: dict[str, dict[str, Any]] = {
    "transformer/config.json": {"_class_name": "QwenImageTransformer2DModel", "in_channels": 64},
    "vae/config.json": {"_class_name": "AutoencoderKLQwenImage"},
    "scheduler/scheduler_config.json": {
        "use_dynamic_shifting": True,
        "max_image_seq_len": 8192,
        "max_shift": 0.9,
        "shift_terminal": 0.02,
    },
    "text_encoder/config.json": QWEN2_5_VL_7B,
    "tokenizer/tokenizer_config.json": {"model_max_length": 131072},
}


class QwenImagePolicy(PerChannelFamily, FlowPolicy):
    """Qwen-Image."""

    transformer_class, pipeline_class = "QwenImageTransformer2DModel", "QwenImagePipeline"
    text_encoder = QwenImageTextEncoder
    masks_text = True
    num_rounded, rounded_unit = 1, 1.0
    tied = ("in_channels", "joint_attention_dim")
    hub_tag = "qwen-image"
    published: ClassVar = {"Qwen/Qwen-Image": PUBLISHED, "Qwen/Qwen-Image-2512": PUBLISHED}
    single_file = SingleFile(keeps_names=True)

    @property
    def idle(self) -> tuple[str, ...]:
        """What the last block makes of the text, which nobody reads."""
        last = f"transformer_blocks.{self.configs['transformer'].get('num_layers', 60) - 1}"
        return f"{last}.attn.to_add_out.", f"{last}.txt_mlp."

    def network(self, x: Latents, sigma: Tensor, text: Text, size: Size, told: list[Tensor]) -> Latents:
        """Pictures are videos of one frame; attention leaves padding of texts out."""
        velocity: Tensor = self.transformer(
            hidden_states=x,
            timestep=sigma,
            encoder_hidden_states=text.tensors["prompt_embeds"],
            encoder_hidden_states_mask=text.mask("prompt_embeds"),
            img_shapes=[[(1, size[0] // CELL, size[1] // CELL)]] * len(x),
            return_dict=False,
        )[0]
        return velocity

    def guide(self, conditional: Latents, unconditional: Latents, guidance: float) -> Latents:
        """With each token as long as without guidance."""
        guided = super().guide(conditional, unconditional, guidance)
        length, guided_length = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (conditional, guided))
        return guided * (length / guided_length)

    def pipeline_arguments(self, guidance: float, max_sequence_length: int) -> Mapping[str, Any]:
        """The pipeline guides where it is given a text to move away from."""
        negative = self.text_encoder.negative
        return {
            "true_cfg_scale": guidance,
            "negative_prompt": negative,
            "max_sequence_length": max_sequence_length,
        }
