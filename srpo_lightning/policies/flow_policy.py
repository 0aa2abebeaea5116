"""Everything that the families of flow models in diffusers' layout share; a family adds one file, such as flux.py.

Shapes: B samples, `latent` the shape of one sample's latents as the transformer reads them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import diffusers
import torch
from jaxtyping import Float
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Size
from srpo_lightning.encoding import Encoder, Encoding
from srpo_lightning.files.pretrained import read_json, safetensors_files, same_files
from srpo_lightning.policies import adapters, divided, loading
from srpo_lightning.policies.adapters import Lora
from srpo_lightning.policies.base import Shard
from srpo_lightning.policies.family import Images, Latents, check_family, check_size
from srpo_lightning.policies.guided import Guided, SparseGuidance
from srpo_lightning.policies.image_encoder import VAEEncoder
from srpo_lightning.policies.parallel import check_attention, check_choice
from srpo_lightning.training.context import Context
from srpo_lightning.training.nf4 import check_bitsandbytes


class FlowPolicy(Guided):
    """A flow transformer, trained, between its frozen VAE and its scheduler's noise levels.

    Args:
        pretrained: folder in the layout of the family's diffusers pipeline, or a hub id such as
            black-forest-labs/FLUX.1-dev.
        height: height of the pictures in pixels, a whole number of the family's cells (FLUX.1: 16).
        width: width of the pictures in pixels, likewise.
        dtype: numbers that the transformer's weights are kept in. Keep float32 where they are trained in full; the
            trainer's precision (bf16-mixed) decides what they are computed in. Adapters are float32 either way.
        vae_dtype: numbers that the frozen VAE's weights are kept in.
        gradient_checkpointing: whether each transformer block is recomputed in the backward pass instead of stored.
        vae_checkpointing: whether each block of the VAE's decoder is recomputed likewise.
        vae_tiling: whether large pictures are decoded tile by tile: less memory, faint seams possible. Clips whose
            decoding is recomputed in the backward pass are decoded whole there, one latent frame after the other.
        resolution_shift: whether noise levels are shifted by the scheduler's resolution-dependent rule, where an
            objective asks for no shift of its own; false is its static shift, null what the scheduler says.
        quantize_timesteps: whether the noise level that the transformer is told is truncated to 1000ths, as the
            research code of SRPO does; off by default because it tells the model a level that the latents do not have.
        exact_conditioning: whether noise level and guidance reach the transformer in float32 under bf16-mixed too. By
            default they are rounded to bfloat16, as diffusers does when it draws in bfloat16: 3.5 becomes 3.504.
        adapter: LoRA that is trained beside the transformer's weights, which then stay as they are; needs the extra
            `lora`. Null trains the weights themselves.
        quantize: bits of the transformer's blocks: nf4 keeps their linear layers in 4.5 bits per weight, nf4-double in
            4.13 (FLUX.1: 6.8 and 6.2 GB instead of 23.8); with an adapter only. They are read and rounded one after the
            other, on a GPU where there is one. Embedders, norms and the last projection keep `dtype`. Needs the extra
            `quant`.
        quantize_dir: folder where blocks in 4 bits are kept as they were rounded, as large as in memory, so that the
            next start reads them in seconds; null rounds them at every start.
        compile: whether each transformer block is compiled with torch.compile when it first runs, which takes minutes;
            not with DoRA.
        attention: attention kernel by diffusers' name for it, such as _native_flash or flash; null is torch's choice.
        rollout_cache: relative mean difference of the first block's change between two steps of a rollout, below which
            the other blocks' change is taken from the step before: diffusers' FirstBlockCache. 0.05 to 0.2 is usual;
            null computes every step.
        transformer: transformer to start from in the place of the one in `pretrained`: a folder that `export` wrote
            (--format diffusers), or any folder or hub id in diffusers' layout; null takes that of `pretrained`.
        trained_guidance: what classifier-free guidance does in a trained step. With conditional the step costs one
            pass, of the prompt alone; with detached the pass without a prompt joins it, without a gradient. Rollouts
            and samples are always guided. For models without an embedded guidance.
        guidance_every: steps of a training's rollout from one pass without a prompt to the next; steps between take
            over the last one's difference to the pass with the prompt. 1 makes both passes at each.
        guided_steps: number of the first steps of a training's rollout that are guided by a second pass; the others
            cost one pass. Null guides all.
    """

    without_effect = frozenset({"quantize_dir"})

    def __init__(
        self,
        pretrained: str,
        height: PositiveInt = 1024,
        width: PositiveInt = 1024,
        dtype: Literal["float32", "bfloat16"] = "float32",
        vae_dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
        vae_checkpointing: bool = False,
        vae_tiling: bool = False,
        resolution_shift: bool | None = None,
        quantize_timesteps: bool = False,
        exact_conditioning: bool = False,
        adapter: Lora | None = None,
        quantize: Literal["none", "nf4", "nf4-double"] = "none",
        quantize_dir: str | None = ".cache/nf4",
        compile: bool = False,
        attention: str | None = None,
        rollout_cache: PositiveFloat | None = None,
        transformer: str | None = None,
        trained_guidance: Literal["conditional", "detached"] = "conditional",
        guidance_every: PositiveInt = 1,
        guided_steps: NonNegativeInt | None = None,
    ) -> None:
        super().__init__()
        self.pretrained, self.start = pretrained, transformer
        self.size: Size = (height, width)
        self.dtype, self.vae_dtype = getattr(torch, dtype), getattr(torch, vae_dtype)
        self.gradient_checkpointing = gradient_checkpointing
        self.vae_checkpointing, self.vae_tiling = vae_checkpointing, vae_tiling
        self.resolution_shift = resolution_shift
        self.quantize_timesteps, self.exact_conditioning = quantize_timesteps, exact_conditioning
        self.adapter, self.quantize, self.quantize_dir = adapter, quantize, quantize_dir
        self.compiles_blocks, self.attention, self.rollout_cache = compile, attention, rollout_cache
        self.trained_guidance = trained_guidance
        self.sparse_guidance = SparseGuidance(guidance_every, guided_steps)
        check_size(self.size, self.cell)
        self.configs = {
            "transformer": loading.transformer_config(pretrained, transformer, self.tied),
            "scheduler": read_json(pretrained, "scheduler", "scheduler_config.json"),
        }
        self._check_settings()
        self.transformer: Any = None

    def _check_settings(self) -> None:
        check_family(type(self), self.configs["transformer"], self.pretrained)
        if self.adapter is not None:
            self.adapter.check(loading.blocks(self.empty_transformer()), self.idle)
        if self.quantize != "none":
            check_bitsandbytes()
            if self.adapter is None:
                raise ValueError(
                    f"quantize is {self.quantize}, but weights in 4 bits cannot be trained: give model.policy."
                    "init_args.adapter, for instance {rank: 32}, or set quantize to none"
                )
        if self.attention is not None:
            check_attention(self.attention, masks=self.masks_text)
            check_choice(self.empty_transformer(), type(self).__name__)
        if self.compiles_blocks:
            loading.check_compiled(self.adapter, self.rollout_cache)
        if self.exact_conditioning and not self.num_rounded:
            raise ValueError(
                f"exact_conditioning is true, but autocast rounds nothing that {type(self).__name__} is told: set it "
                "to false"
            )
        if self.trained_guidance == "detached" and not self.has_negative:
            raise ValueError(
                f"trained_guidance is detached, but {type(self).__name__} makes one pass, without a text to move away "
                "from: set it to conditional"
            )
        if not self.sparse_guidance.is_whole and not self.has_negative:
            raise ValueError(
                f"guidance_every or guided_steps is set, but {type(self).__name__} makes one pass, without a text to "
                "move away from: leave both out"
            )
        has_cache = self.caches_features and hasattr(self.diffusers_class, "enable_cache")
        if self.rollout_cache is not None and not has_cache:
            raise ValueError(f"rollout_cache is set, but {self.transformer_class} has no cache: set it to null")

    def encoder(self, wanted: Encoding) -> Encoder:
        """The pipeline's text encoders, and its VAE's encoder."""

        def images() -> VAEEncoder:
            return VAEEncoder(self.pretrained, self.read_vae, self.from_vae, device=wanted.device, draw=wanted.draws)

        text = self.text_encoder.of(self.pretrained, wanted)
        if not self.has_negative:
            text.negative = None
        return Encoder(text, images, self.size, self.cell)

    def text_shapes(self, wanted: Encoding) -> dict[str, tuple[int, ...]]:
        """From configurations alone."""
        length = wanted.max_sequence_length or self.text_encoder.longest(self.pretrained)
        return self.text_encoder.shapes_of(self.pretrained, length)

    def load(self, shard: Shard | None = None) -> None:
        """Read transformer and VAE, once; only the transformer is trained, or its adapters."""
        if self.transformer is not None:
            return
        if shard is not None and self.quantize != "none":
            raise ValueError(
                f"quantize is {self.quantize}, and weights in 4 bits cannot be divided over ranks: set "
                "trainer.strategy to ddp, or trainer.devices to 1"
            )
        vae = self.read_vae(self.vae_dtype)
        transformer = loading.read(self) if shard is None else loading.stream(self, shard)
        if self.adapter is None:
            self._choose_trained(transformer)
        else:
            adapters.start(transformer, self.adapter)
        self.transformer = transformer.train()
        self.vae = vae.requires_grad_(False)
        if self.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if self.vae_checkpointing:
            self.vae.enable_gradient_checkpointing()
        if self.vae_tiling:
            self.vae.enable_tiling()

    def _choose_trained(self, transformer: Any) -> None:
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(not name.startswith(self.idle))

    def check_divided(self, degree: int, sizes: Sequence[Size], text: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a transformer without diffusers' plan for it, and what does not come out even."""
        divided.check_plan(self.diffusers_class, self.configs["transformer"], degree)
        divided.check_settings(
            degree,
            compiles=self.compiles_blocks,
            attention=self.attention,
            caches=self.rollout_cache is not None,
        )
        for size in sizes or [self.size]:
            divided.check_picture(degree, size, self.num_tokens(size), self.cell)
        if divided.divides_text(self.diffusers_class._cp_plan) and not self.masks_text:
            divided.check_text(degree, max(shape[0] for shape in text.values() if len(shape) == 2))

    def divide(self, context: Context) -> None:
        """Compute a part of the tokens of every later pass."""
        assert self.transformer is not None, "load() comes first"
        if self.context is None:
            divided.divide(self.transformer, context)
            self.context = context

    @property
    def diffusers_class(self) -> Any:
        """The transformer's class."""
        return getattr(diffusers, self.transformer_class)

    def empty_transformer(self) -> Any:
        """The transformer without memory."""
        return loading.empty(self.diffusers_class, self.configs["transformer"])

    def outline(self) -> Any:
        """The transformer on the meta device: the names, shapes and dtypes of its weights and of its adapters'."""
        transformer = loading.cast(self.empty_transformer(), self.dtype)
        self._choose_trained(transformer)
        if self.adapter is not None:
            adapters.add(transformer, self.adapter, loading.blocks(transformer), self.idle)
        return transformer

    def restart(self) -> None:
        """The published weights or those of `transformer`; adapters that change nothing yet, or those to start from."""
        assert self.transformer is not None, "load() comes first"
        if self.adapter is None:
            loading.fill(self, self.transformer)
        else:
            adapters.start(self.transformer, self.adapter)

    @property
    def has_reference(self) -> bool:  # type: ignore[override]  # a constant of other policies
        """With an adapter that started from no change: the weights beside it never change."""
        return self.adapter is not None and self.adapter.pretrained is None

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Without the adapter."""
        assert self.transformer is not None, "load() comes first"
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()

    @property
    def start_place(self) -> tuple[str, str]:
        """The folder or hub id of the transformer before training, and the subfolder therein."""
        return (self.pretrained, "transformer") if self.start is None else (self.start, "")

    def decode(self, latents: Latents, size: Size | None = None) -> Images:
        """Clean latents to images in [0, 1], with gradient."""
        z = self.to_vae(self.vae, latents, size or self.size)
        decoded: Tensor = self.vae.decode(z.to(self.vae_dtype), return_dict=False)[0]
        return (decoded.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def sigmas(self, num_steps: int, shift: float | None = None, size: Size | None = None) -> Float[Tensor, " N"]:
        """The noise levels of the model's own scheduler, or of a given `shift`."""
        return self.schedule(num_steps, size or self.size) if shift is None else flow.schedule(num_steps, shift)

    @property
    def fingerprint(self) -> str:
        """The transformer's architecture, as its configuration gives it, and the adapter's."""
        architecture = {k: v for k, v in self.configs["transformer"].items() if not k.startswith("_")}
        if self.adapter is not None:
            architecture["adapter"] = self.adapter.architecture(self._adapted)
            if self.start is not None:
                files = safetensors_files(*self.start_place, loading.STEM)
                architecture["beside"] = same_files(files.values())
        return f"{type(self).__name__} {json.dumps(architecture, sort_keys=True)}"

    @cached_property
    def _adapted(self) -> list[str]:
        return adapters.ends(loading.blocks(self.empty_transformer()))
