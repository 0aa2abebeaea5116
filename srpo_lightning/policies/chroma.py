"""Chroma: FLUX.1's blocks and latents without its guidance, its pooled text and its modulation of each block.

Source: diffusers' ChromaTransformer2DModel and ChromaPipeline; names of single files are FLUX.1's, but for
github.com/lodestone-rock/flow, src/models/chroma/module/layers.py (Approximator).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from srpo_lightning.batch import Size, Text
from srpo_lightning.files.pretrained import read_json
from srpo_lightning.policies.family import Latents, PackedFamily
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.policies.flux import FluxPolicy
from srpo_lightning.policies.geometries import T5_XXL, kl_vae
from srpo_lightning.policies.packing import image_ids
from srpo_lightning.policies.text_encoder import PipelineTextEncoder

APPROXIMATOR = "distilled_guidance_layer"
"""Where all modulations come from."""

NORMS = tuple(f"{APPROXIMATOR}.norms.{i}" for i in range(5))


class ChromaTextEncoder(PipelineTextEncoder):
    """T5's sequence, which does not attend to padding, and which of its tokens count: all before the second padding."""

    tokenizer_classes: ClassVar = {"tokenizer": "T5TokenizerFast"}
    model_classes: ClassVar = {"text_encoder": "T5EncoderModel"}
    counting, quantized = "tokenizer", "text_encoder"
    whole_layers = ("wo",)  # transformers casts its input to the dtype of its weight
    negative = ""

    @classmethod
    def shapes_of(cls, pretrained: str, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """`prompt_embeds` [T, D] and `prompt_attention_mask` [T]."""
        width = read_json(pretrained, "text_encoder", "config.json")["d_model"]
        return {"prompt_embeds": (max_sequence_length, width), "prompt_attention_mask": (max_sequence_length,)}

    def features(self, prompts: list[str], models: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """As ChromaPipeline.encode_prompt computes them."""
        tokens = self.padded("tokenizer", prompts, self.max_sequence_length)
        sequence = models["text_encoder"](tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        places = torch.arange(self.max_sequence_length, device=sequence.device)
        masks = (places <= tokens.attention_mask.sum(dim=1, keepdim=True)).to(sequence.dtype)
        return [{"prompt_embeds": s, "prompt_attention_mask": m} for s, m in zip(sequence, masks, strict=True)]


class ChromaPolicy(PackedFamily, FlowPolicy):
    """Chroma, as diffusers 0.42 draws it: attention adds the mask of ones and zeros to its logits.

    So padding is attended to, e times less than what counts. The model was trained with a mask that leaves it out:
    github.com/huggingface/diffusers/issues/12116 and 13619.
    """

    transformer_class, pipeline_class = "ChromaTransformer2DModel", "ChromaPipeline"
    text_encoder = ChromaTextEncoder
    masks_text, caches_features = True, False
    num_rounded = 1  # 1000 sigma
    tied = ("in_channels", "joint_attention_dim")
    hub_tag = "chroma"
    published: ClassVar = {
        "lodestones/Chroma1-HD": {
            "transformer/config.json": {"_class_name": "ChromaTransformer2DModel", "in_channels": 64},
            "vae/config.json": kl_vae(0.3611, 0.1159),
            "scheduler/scheduler_config.json": {"shift": 3.0, "use_dynamic_shifting": True},
            "text_encoder/config.json": T5_XXL,
            "tokenizer/tokenizer_config.json": {"model_max_length": 512},
        }
    }
    reads_single_file = FluxPolicy.reads_single_file
    single_file = FluxPolicy.single_file._replace(
        outer={
            **FluxPolicy.single_file.outer,
            **{name: [name] for name in (f"{APPROXIMATOR}.in_proj", f"{APPROXIMATOR}.out_proj", *NORMS)},
        },
        blocks={
            **FluxPolicy.single_file.blocks,
            f"{APPROXIMATOR}.layers": (
                f"{APPROXIMATOR}.layers",
                {"in_layer": ["linear_1"], "out_layer": ["linear_2"]},
            ),
        },
        scales=(*FluxPolicy.single_file.scales, *NORMS),
    )

    def network(self, x: Latents, sigma: Tensor, text: Text, size: Size, told: list[Tensor]) -> Latents:
        """The level is told as it is; text has the position 0."""
        rows, mask = text.tensors["prompt_embeds"], text.tensors["prompt_attention_mask"]
        mask = torch.cat([mask, mask.new_ones(x.shape[:2])], dim=1)
        if self.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing(partial(_recomputed, mask))
        velocity: Tensor = self.transformer(
            hidden_states=x,
            timestep=sigma,
            encoder_hidden_states=rows,
            txt_ids=x.new_zeros(rows.shape[1], 3),
            img_ids=image_ids(size, x),
            attention_mask=mask,
            return_dict=False,
        )[0]
        return velocity


def _recomputed(mask: Tensor, block: nn.Module, *arguments: Any) -> Any:
    """A block that is computed again in the backward pass, with the mask, which diffusers 0.42 forgets for some."""
    is_without = len(arguments) == 3
    return checkpoint(block, *arguments, *([mask] if is_without else []), use_reentrant=False)
