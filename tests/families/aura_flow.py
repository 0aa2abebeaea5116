"""AuraFlow as a second family: what a family's file holds, and nothing else in the package knows of it.

Source: diffusers' AuraFlowTransformer2DModel and AuraFlowPipeline.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from srpo_lightning.batch import Size, Text
from srpo_lightning.files.pretrained import read_json
from srpo_lightning.policies.family import Latents, SpatialFamily
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.policies.text_encoder import PipelineTextEncoder


class AuraFlowTextEncoder(PipelineTextEncoder):
    """UMT5's rows of each prompt; the model attends to zeros behind them."""

    tokenizer_classes: ClassVar = {"tokenizer": "T5TokenizerFast"}
    model_classes: ClassVar = {"text_encoder": "UMT5EncoderModel"}
    counting, quantized = "tokenizer", "text_encoder"
    most_tokens = 256
    ragged = frozenset({"prompt_embeds"})
    negative = ""

    @classmethod
    def shapes_of(cls, pretrained: str, max_sequence_length: int) -> dict[str, tuple[int, ...]]:
        """`prompt_embeds` [T, D]."""
        return {"prompt_embeds": (max_sequence_length, read_json(pretrained, "text_encoder", "config.json")["d_model"])}

    def features(self, prompts: list[str], models: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """Those of the prompt's own tokens."""
        tokens = self.padded("tokenizer", prompts, self.max_sequence_length)
        rows = models["text_encoder"](input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return [{"prompt_embeds": own[:n]} for own, n in zip(rows, tokens.attention_mask.sum(1), strict=True)]


class AuraFlowPolicy(SpatialFamily, FlowPolicy):
    """AuraFlow."""

    transformer_class, pipeline_class = "AuraFlowTransformer2DModel", "AuraFlowPipeline"
    text_encoder = AuraFlowTextEncoder
    shifts_twice = True
    tied = ("in_channels", "joint_attention_dim")

    def network(self, x: Latents, sigma: Tensor, text: Text, size: Size, told: list[Tensor]) -> Latents:
        """The level is told as it is."""
        rows = text.tensors["prompt_embeds"]
        padding = self.text_encoder.longest(self.pretrained) - rows.shape[1]
        return self.transformer(
            x, encoder_hidden_states=functional.pad(rows, (0, 0, 0, padding)), timestep=sigma, return_dict=False
        )[0]
