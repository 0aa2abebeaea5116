"""What a family of flow models says of itself, in one file of its own; FLUX.1's is flux.py.

Shapes: B samples, `latent` the shape of one sample's latents as the transformer reads them.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Size, Text
from srpo_lightning.files.pretrained import load_whole, read_json
from srpo_lightning.policies.base import Policy
from srpo_lightning.policies.packing import CELL, VAE_FACTOR, pack, unpack
from srpo_lightning.policies.single_file import SingleFile
from srpo_lightning.policies.text_encoder import PipelineTextEncoder

Latents: TypeAlias = Float[Tensor, "B *latent"]
Images: TypeAlias = Float[Tensor, "B 3 H W"]


class Family(Policy):
    """The classes, the network call, the schedule, the latents and the names of one family."""

    transformer_class: ClassVar[str]
    """The class of the transformer in diffusers; below those of the VAE and of the pipeline."""

    vae_class: ClassVar[str] = "AutoencoderKL"
    pipeline_class: ClassVar[str]

    pipeline_picture: ClassVar[str] = "images[0]"
    """Where the first picture is in what the pipeline returns."""

    pipeline_clip: ClassVar[str] = ""
    """Where the frames of the first clip are, of a family of clips."""

    text_encoder: ClassVar[type[PipelineTextEncoder]]

    single_file: ClassVar[SingleFile | None] = None
    """The names of weights in original single files; None: none are written."""

    cell: ClassVar[int] = CELL
    """Pixels that the sides of a picture are a multiple of."""

    masks_text: ClassVar[bool] = False
    """Whether attention leaves the padding of texts out by a mask, which some kernels do not take."""

    caches_features: ClassVar[bool] = True
    """Whether diffusers' cache of features, where the transformer's class has one, knows its blocks."""

    num_rounded: ClassVar[int] = 0
    """How many leading inputs of the module `time_text_embed`, level and guidance, autocast would round."""

    published: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    """The small files of published models by hub id and path, by which memory is predicted without their files."""

    rounded_unit: ClassVar[float] = 1000.0
    """What level and guidance are multiplied by before that module reads them."""

    comfy_has_original_names: ClassVar[bool] = False
    """Whether ComfyUI knows an adapter's layers by the names of the model's first publication alone."""

    shifts_twice: ClassVar[bool] = False
    """Whether the pipeline has its scheduler choose the levels, whose lowest is shifted before all are."""

    tied: ClassVar[tuple[str, ...]] = ("in_channels",)
    """Numbers of the transformer's configuration that another transformer to start from must share."""

    hub_tag: ClassVar[str] = "flow-matching"
    """The family's tag on model cards."""

    pretrained: str
    size: Size
    resolution_shift: bool | None
    configs: dict[str, dict[str, Any]]
    transformer: Any

    @cached_property
    def is_distilled(self) -> bool:
        """Whether the pipeline says that its transformer was distilled to draw in few steps."""
        return bool(read_json(self.pretrained, "", "model_index.json").get("is_distilled", False))

    @property
    def idle(self) -> tuple[str, ...]:
        """Beginnings of the names of weights that no gradient reaches, and which are not trained."""
        return ()

    @abstractmethod
    def network(self, x: Latents, sigma: Float[Tensor, " B"], text: Text, size: Size, told: list[Tensor]) -> Latents:
        """One pass of the transformer: the velocity, noise - x0.

        Args:
            x: noisy latents.
            sigma: noise level, truncated where `quantize_timesteps` asks for it.
            text: features of the prompts, in the dtype of `x`.
            size: pixels of the pictures.
            told: [B] each, the level and, where the model embeds one, the guidance.
        """

    @abstractmethod
    def latent_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """The shape of one sample's latents."""

    def read_vae(self, dtype: torch.dtype) -> Any:
        """The VAE with its weights, which encodes and decodes pictures [B, 3, H, W] in [-1, 1]."""
        return load_whole(getattr(diffusers, self.vae_class), self.pretrained, "vae", torch_dtype=dtype)

    @abstractmethod
    def to_vae(self, vae: Any, latents: Latents, size: Size) -> Tensor:
        """Clean latents as the VAE's decoder reads them, [B, c, h, w]."""

    @abstractmethod
    def from_vae(self, vae: Any, z: Tensor) -> Latents:
        """Undo `to_vae`."""

    @abstractmethod
    def pipeline_noise(self, generator: torch.Generator, dtype: torch.dtype) -> Latents:
        """[1, *latent]: the noise that the family's pipeline draws from a generator for one picture."""

    def pipeline_arguments(self, guidance: float, max_sequence_length: int) -> Mapping[str, Any]:
        """What the family's pipeline is told beside prompt, size, steps and generator."""
        return {"guidance_scale": guidance, "max_sequence_length": max_sequence_length}

    def reads_single_file(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether diffusers' converter of original single files knows weights of these shapes."""
        return True

    def shift_for(self, num_steps: int, size: Size) -> float:
        """The shift of the noise levels: the scheduler's static one, or the one that depends on the resolution."""
        return self.dynamic_shift(num_steps, size) if self.is_dynamic else float(self.configs["scheduler"]["shift"])

    @property
    def is_dynamic(self) -> bool:
        """Whether the shift is the one that depends on the resolution."""
        chosen = self.resolution_shift
        return bool(self.configs["scheduler"].get("use_dynamic_shifting", False) if chosen is None else chosen)

    def dynamic_shift(self, num_steps: int, size: Size) -> float:
        """The shift that depends on the resolution, and in some families on the number of steps."""
        tokens = (size[0] // self.cell) * (size[1] // self.cell)
        return resolution_dependent_shift(tokens, self.configs["scheduler"])

    def num_tokens(self, size: Size) -> int:
        """The number of tokens of a picture of this size."""
        return (size[0] // self.cell) * (size[1] // self.cell)

    def schedule(self, num_steps: int, size: Size) -> Float[Tensor, " N"]:
        """The levels of the pipeline's sampler, `num_steps + 1` from 1 to 0, in float64.

        A scheduler with a `shift_terminal` has them stretched, so that this is the last one above 0.
        """
        scheduler, shift = self.configs["scheduler"], self.shift_for(num_steps, size)
        levels = flow.schedule(num_steps, shift)
        if self.shifts_twice:
            lowest = levels.new_tensor(1 / scheduler.get("num_train_timesteps", 1000))
            lowest = lowest if self.is_dynamic else flow.shift_sigma(lowest, shift)
            even = torch.linspace(1, float(lowest), num_steps, dtype=levels.dtype)
            levels[:-1] = flow.shift_sigma(even, shift)
        terminal = scheduler.get("shift_terminal")
        if terminal:
            levels[:-1] = 1 - (1 - levels[:-1]) * (1 - terminal) / (1 - levels[-2])
        return levels

    def guide(self, conditional: Latents, unconditional: Latents, guidance: float) -> Latents:
        """U + g (c - u): classifier-free guidance (arXiv 2207.12598) in diffusers' convention, where 1 is none."""
        return unconditional + guidance * (conditional - unconditional)


def families(above: type[Family] = Family) -> Iterator[type[Family]]:
    """Every family whose file has been imported, those that others are made from first."""
    for cls in above.__subclasses__():
        if "transformer_class" in vars(cls):
            yield cls
        yield from families(cls)


def family_of(transformer: Mapping[str, Any]) -> type[Family] | None:
    """The family of a transformer with this configuration; None: no file here knows it, or it does not say."""
    name = transformer.get("_class_name")
    return next((family for family in families() if family.transformer_class == name), None)


class SpatialFamily(Family):
    """A family that reads a scaled VAE's latents as they are: [c, h, w], h = H / 8."""

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents."""
        return int(self.configs["transformer"]["in_channels"])

    def latent_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """(c, h, w)."""
        height, width = size or self.size
        return self.latent_channels, height // VAE_FACTOR, width // VAE_FACTOR

    def to_vae(self, vae: Any, latents: Latents, size: Size) -> Tensor:
        """With the VAE's own scale and shift."""
        return latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)

    def from_vae(self, vae: Any, z: Tensor) -> Latents:
        """Undo `to_vae`."""
        return (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def pipeline_noise(self, generator: torch.Generator, dtype: torch.dtype) -> Latents:
        """Drawn as the VAE's latents."""
        height, width = (side // VAE_FACTOR for side in self.size)
        return torch.randn(1, self.latent_channels, height, width, generator=generator, dtype=dtype).float()


class PackedFamily(SpatialFamily):
    """A family that reads 2 x 2 cells of a scaled VAE's latents as tokens: [L, C], L = (H / 16) (W / 16)."""

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents; a token has four times as many."""
        return super().latent_channels // 4

    def latent_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """(L, C)."""
        height, width = size or self.size
        return (height // CELL) * (width // CELL), 4 * self.latent_channels

    def to_vae(self, vae: Any, latents: Latents, size: Size) -> Tensor:
        """Unpacked, with the VAE's own scale and shift."""
        return super().to_vae(vae, unpack(latents, size), size)

    def from_vae(self, vae: Any, z: Tensor) -> Latents:
        """Scaled and packed."""
        return pack(super().from_vae(vae, z))

    def pipeline_noise(self, generator: torch.Generator, dtype: torch.dtype) -> Latents:
        """Drawn as the VAE's latents, then packed."""
        return pack(super().pipeline_noise(generator, dtype))


def resolution_dependent_shift(num_tokens: int, scheduler: Mapping[str, Any]) -> float:
    """The shift for a picture of `num_tokens` tokens.

    Source: `calculate_shift` and `time_shift` of diffusers' FluxPipeline and FlowMatchEulerDiscreteScheduler:
    mu is linear in the number of tokens and the shift is exp(mu).
    """
    few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return math.exp(low + (high - low) * (num_tokens - few) / (many - few))


def check_family(family: type[Family], transformer: Mapping[str, Any], pretrained: str) -> None:
    """Refuse another family's model.

    Raises:
        ValueError: naming the class that fits it.
    """
    found = transformer.get("_class_name", family.transformer_class)
    if found != family.transformer_class:
        right = family_of(transformer)
        cure = (
            f"set model.policy.class_path to {right.__name__}, or to AutoPolicy, which chooses by itself"
            if right
            else "give a model of its family"
        )
        raise ValueError(
            f"pretrained is {pretrained}, whose transformer is a {found}, and {family.__name__} reads a "
            f"{family.transformer_class}: {cure}"
        )


def check_size(size: Size, cell: int) -> None:
    """Refuse a picture that is no whole number of cells.

    Raises:
        ValueError: with the nearest sizes that are.
    """
    for name, side in zip(("height", "width"), size, strict=True):
        if side % cell:
            below = side - side % cell
            raise ValueError(
                f"{name} is {side} pixels, which {cell} does not divide: set it to {below or cell} or {below + cell}"
            )
