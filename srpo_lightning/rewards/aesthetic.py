"""Aesthetic predictors: how much people like a picture, whatever it shows. None of them reads the text.

The score is `head(f / |f|)`, f the features of an image encoder. No paper; each class names its repository.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import init_empty_weights
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from srpo_lightning.files.pretrained import load_exactly, read_json, read_weights, unreadable_is_refused, weights_file
from srpo_lightning.rewards.base import Images, Reward, Scores, check_columns
from srpo_lightning.rewards.pixels import Preprocessing

HIDDEN = (1024, 128, 64, 16)  # between features and score, in every head of more than one layer
TEXT = ("text_model.", "text_projection.", "logit_scale", "logit_bias")  # of a whole model, not read


class Head(nn.Module):
    """Linear layers in a row; the published ones have dropout between them, for training, and no activation.

    Args:
        widths: Widths of the features, of what each layer but the last gives, and 1.
        places: Number of each layer in the published file, which counts dropout too.
        name: Name of the layers in the published file.
    """

    def __init__(self, widths: Sequence[int], places: Sequence[int], name: str = "layers") -> None:
        super().__init__()
        layers = zip(places, pairwise(widths), strict=True)
        self.add_module(name, nn.ModuleDict({str(place): nn.Linear(*shape) for place, shape in layers}))

    def forward(self, features: Float[Tensor, "B E"]) -> Scores:
        """Scores, computed in the features' dtype, whatever the weights' and autocast's."""
        with torch.autocast(features.device.type, enabled=False):
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    weight, bias = layer.weight.to(features.dtype), layer.bias.to(features.dtype)
                    features = functional.linear(features, weight, bias)
        return features.squeeze(-1)


class ClipVision(nn.Module):
    """CLIP's image encoder with its projection to where images and texts meet."""

    kinds = ("clip", "clip_vision_model")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        vision = CLIPVisionConfig.from_dict(dict(config.get("vision_config", config)))
        self.image_size = int(vision.image_size)
        self.num_features = int(config.get("projection_dim", vision.projection_dim))
        self.vision_model = CLIPVisionModel(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, self.num_features, bias=False)

    def forward(self, pixels: Images) -> Float[Tensor, "B E"]:
        """Features, of any length."""
        features: Tensor = self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output)
        return features


class SiglipVision(nn.Module):
    """SigLIP's image encoder with its attention pooling."""

    kinds = ("siglip", "siglip_vision_model")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        vision = SiglipVisionConfig.from_dict(dict(config.get("vision_config", config)))
        self.image_size = int(vision.image_size)
        self.num_features = int(vision.hidden_size)
        self.vision_model = SiglipVisionModel(vision)

    def forward(self, pixels: Images) -> Float[Tensor, "B E"]:
        """Features, of any length."""
        features: Tensor = self.vision_model(pixel_values=pixels).pooler_output
        return features


class AestheticReward(Reward):
    """A published head on the unit feature vector of a published image encoder.

    Args:
        head: File of the head, or a folder or hub id that holds it.
        pretrained: Folder or hub id of the image encoder or of the whole model, whose text encoder is not read.
        dtype: Precision of the encoder's weights; the head computes in float32 either way.
    """

    reads_text = False
    head_file: ClassVar[str]
    encoder_class: ClassVar[type[ClipVision | SiglipVision]]

    def __init__(self, head: str, pretrained: str, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
        super().__init__()
        self.config = read_json(pretrained, "", "config.json")
        kind, kinds = self.config.get("model_type"), self.encoder_class.kinds
        if kind not in kinds:
            raise ValueError(
                f"{pretrained} is of type {kind}, {type(self).__name__} needs {' or '.join(kinds)}: "
                "leave out `pretrained`, or give a copy of its default"
            )
        self.pretrained = pretrained
        self.head_path = weights_file(head, self.head_file)
        self.dtype = getattr(torch, dtype)
        self.encoder: ClipVision | SiglipVision | None = None

    def load(self) -> None:
        """Read image encoder and head, once."""
        if self.encoder is not None:
            return
        with init_empty_weights(include_buffers=False):
            encoder = self.encoder_class(self.config)
        self.head = self.read_head(encoder.num_features).requires_grad_(False)
        path = weights_file(self.pretrained, "model.safetensors")
        load_exactly(encoder, read_vision(path, self.dtype), path)
        self.preprocess = self.preprocessing(encoder.image_size)
        self.encoder = encoder.eval().requires_grad_(False)

    @abstractmethod
    def read_head(self, num_features: int) -> Head:
        """The head, with its weights, on features of this length."""

    @abstractmethod
    def preprocessing(self, image_size: int) -> Preprocessing:
        """How images of any size become the encoder's pixels."""

    def forward(self, images: Images, texts: Sequence[str]) -> Scores:
        """The score of each image, whatever its text."""
        assert self.encoder is not None, "load() comes first"
        pixels = self.preprocess(images)
        scores: Tensor = self.head(functional.normalize(self.encoder(pixels).to(pixels.dtype), dim=-1))
        return scores

    def scores(self, images: Images, texts: Sequence[Sequence[str]]) -> Float[Tensor, "B T"]:
        """The score of each image, computed once, T times over."""
        check_columns(images, texts)
        return self.forward(images, [])[:, None].expand(-1, len(texts))


class LaionAesthetic(AestheticReward):
    """LAION's aesthetic predictors on CLIP ViT-L/14: about 1 to 10, most pictures 4 to 7.

    Both published heads are recognised by the names in the file: v1, one linear layer
    (sa_0_4_vit_l_14_linear.pth), and the improved one (sac+logos+ava1-l14-linearMSE.pth). Neither comes as a package
    that could be run beside this class, which is tested against their arithmetic instead.

    Source: LAION-AI/aesthetic-predictor; christophschuhmann/improved-aesthetic-predictor:simple_inference.py.

    Args:
        head: File of either head, or a folder or hub id with the improved one.
        pretrained: Folder or hub id of OpenAI's CLIP ViT-L/14, which both heads are for.
    """

    head_file = "sac+logos+ava1-l14-linearMSE.pth"
    encoder_class = ClipVision

    def __init__(self, head: str, pretrained: str = "openai/clip-vit-large-patch14", **kwargs: Any) -> None:
        super().__init__(head, pretrained, **kwargs)

    def read_head(self, num_features: int) -> Head:
        """The head of one layer where the names have no number, the improved one otherwise."""
        state = read_weights(self.head_path)
        if "weight" in state:
            head, state = Head((num_features, 1), (0,)), {f"layers.0.{name}": value for name, value in state.items()}
        else:
            head = Head((num_features, *HIDDEN, 1), (0, 2, 4, 6, 7))
        load_exactly(head, state, self.head_path)
        return head

    def preprocessing(self, image_size: int) -> Preprocessing:
        """OpenAI CLIP's preprocessing, which is torchvision's."""
        return Preprocessing((image_size, image_size), half_even=True)


class AestheticV25(AestheticReward):
    """Aesthetic Predictor V2.5 on SigLIP so400m: 1 to 10, from 5.5 on good.

    The head, aesthetic_predictor_v2_5.pth, is the user's to bring: it and its authors' code are under AGPL-3.0. This
    class is written from a description of the arithmetic alone, and tested against that.

    Source: discus0434/aesthetic-predictor-v2-5.

    Args:
        pretrained: Folder or hub id of SigLIP so400m, patch 14, 384 x 384 pixels, which the head is for.
    """

    head_file = "aesthetic_predictor_v2_5.pth"
    encoder_class = SiglipVision

    def __init__(self, head: str, pretrained: str = "google/siglip-so400m-patch14-384", **kwargs: Any) -> None:
        super().__init__(head, pretrained, **kwargs)

    def read_head(self, num_features: int) -> Head:
        """The head; dropout stands between all of its layers."""
        head = Head((num_features, *HIDDEN, 1), (0, 2, 4, 6, 8), "scoring_head")
        load_exactly(head, read_weights(self.head_path), self.head_path)
        return head

    def preprocessing(self, image_size: int) -> Preprocessing:
        """SigLIP's preprocessing: squashed to a square, in [-1, 1]."""
        return Preprocessing((image_size, image_size), "squash", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def read_vision(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an image encoder by the names in a whole model, one after the other out of its file.

    Raises:
        ValueError: naming the cure, if the file is damaged.
    """
    state = {}
    with unreadable_is_refused(str(path)), safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if not name.startswith(TEXT) and not name.endswith("position_ids"):
                # transformers 5 saves SigLIP's image encoder by itself without a prefix.
                full = name if name.startswith(("vision_model.", "visual_projection.")) else f"vision_model.{name}"
                state[full] = file.get_tensor(name).to(dtype)
    return state
