"""FLUX.1, and every model in its diffusers layout, as a policy.

Shapes: B samples, L = (H / 16) (W / 16) packed image tokens, C = 4 x latent channels (64 for FLUX.1).
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FirstBlockCacheConfig, FluxTransformer2DModel
from jaxtyping import Float
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor, nn

from srpo_lightning import flow
from srpo_lightning.batch import Conditions, Size
from srpo_lightning.files.pretrained import load_whole, read_json, safetensors_files, same_files, stream_into
from srpo_lightning.policies import adapters
from srpo_lightning.policies.adapters import Lora
from srpo_lightning.policies.base import Policy, Shard
from srpo_lightning.policies.parallel import check_attention, compile_blocks
from srpo_lightning.training.nf4 import check_bitsandbytes, keep_in_4_bits

Packed: TypeAlias = Float[Tensor, "B L C"]
Spatial: TypeAlias = Float[Tensor, "B c h w"]
Images: TypeAlias = Float[Tensor, "B 3 H W"]

STEM = "diffusion_pytorch_model"  # of the weight files' names
IMAGE_PX_PER_TOKEN = 16  # the VAE halves three times, packing once more


class FluxPolicy(Policy):
    """FLUX.1's transformer, trained, between its frozen VAE and its scheduler's noise levels.

    Args:
        pretrained: a folder in the layout of diffusers' FluxPipeline, or a hub id such as black-forest-labs/FLUX.1-dev.
        height: of the pictures, in pixels, divisible by 16.
        width: of the pictures, in pixels, divisible by 16.
        dtype: of the transformer's weights. Keep float32 where they are trained in full; the trainer's precision
            (bf16-mixed) decides what they are computed in. Adapters are float32 either way.
        vae_dtype: of the frozen VAE's weights.
        gradient_checkpointing: recompute each transformer block in the backward pass instead of storing it.
        vae_checkpointing: the same for the VAE's decoder.
        vae_tiling: decode large pictures tile by tile: less memory, faint seams possible.
        resolution_shift: where an objective does not ask for a shift of its own, shift noise levels by FLUX's
            resolution-dependent rule (true) or by the scheduler's static shift (false); null does as the model's
            scheduler says, which is what FluxPipeline does.
        quantize_timesteps: truncate the noise level that the transformer is told to 1000ths, as the research code of
            SRPO does; off by default because it tells the model a level other than the one the latents have.
        exact_conditioning: tell the transformer noise level and guidance in float32 under bf16-mixed too. By default
            they are rounded to bfloat16, as diffusers does when it draws in bfloat16: guidance 3.5 becomes 3.504.
        adapter: train a LoRA beside the transformer's weights, which stay as they are, instead of these; needs the
            extra `lora`.
        quantize: nf4 keeps the linear layers of the transformer's blocks in 4.5 bits per weight, nf4-double in 4.13
            (6.8 and 6.2 GB instead of 23.8 for FLUX.1); with an adapter only. They are rounded on the CPU while
            loading. Embedders, norms and the last projection keep `dtype`. Needs the extra `quant`.
        compile: compile each transformer block with torch.compile when it first runs, which takes minutes; not DoRA.
        attention: the attention kernel, by diffusers' name for it, such as _native_cudnn or flash; null is torch's
            choice.
        rollout_cache: in rollouts, where the first block changes its input by nearly what it did at the step before
            (relative mean difference below this), take the other blocks' change from there too: diffusers'
            FirstBlockCache. 0.05 to 0.2 is usual; null computes every step.
        transformer: a transformer to start from in the place of the one in `pretrained`: a folder that `export` wrote
            (--format diffusers), or any folder or hub id in diffusers' layout; null takes that of `pretrained`.
    """

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
        compile: bool = False,
        attention: str | None = None,
        rollout_cache: PositiveFloat | None = None,
        transformer: str | None = None,
    ) -> None:
        super().__init__()
        for name, side in (("height", height), ("width", width)):
            if side % IMAGE_PX_PER_TOKEN:
                below = side - side % IMAGE_PX_PER_TOKEN
                raise ValueError(
                    f"{name} is {side} pixels, which {IMAGE_PX_PER_TOKEN} does not divide: "
                    f"set it to {below or IMAGE_PX_PER_TOKEN} or {below + IMAGE_PX_PER_TOKEN}"
                )
        self.pretrained = pretrained
        self.start = transformer
        self.size: Size = (height, width)
        self.dtype, self.vae_dtype = getattr(torch, dtype), getattr(torch, vae_dtype)
        self.gradient_checkpointing = gradient_checkpointing
        self.vae_checkpointing = vae_checkpointing
        self.vae_tiling = vae_tiling
        self.resolution_shift = resolution_shift
        self.quantize_timesteps = quantize_timesteps
        self.exact_conditioning = exact_conditioning
        self.configs = {
            "transformer": _transformer_config(pretrained, transformer),
            "scheduler": read_json(pretrained, "scheduler", "scheduler_config.json"),
        }
        self.adapter = adapter
        self.quantize = quantize
        if adapter is not None:
            adapter.check(blocks(self._empty_transformer()))
        if quantize != "none":
            check_bitsandbytes()
            if adapter is None:
                raise ValueError(
                    f"quantize is {quantize}, but weights in 4 bits cannot be trained: give model.policy.init_args."
                    "adapter, for instance {rank: 32}, or set quantize to none"
                )
        if attention is not None:
            check_attention(attention)
        if compile:
            _check_compiled(adapter, rollout_cache)
        self.compiles_blocks = compile
        self.attention = attention
        self.rollout_cache = rollout_cache
        self.transformer: FluxTransformer2DModel | None = None

    def load(self, shard: Shard | None = None) -> None:
        """Read transformer and VAE, once; only the transformer is trained, or its adapters."""
        if self.transformer is not None:
            return
        if shard is not None and self.quantize != "none":
            raise ValueError(
                f"quantize is {self.quantize}, and weights in 4 bits cannot be divided over ranks: set "
                "trainer.strategy to ddp, or trainer.devices to 1"
            )
        vae = load_whole(AutoencoderKL, self.pretrained, "vae", torch_dtype=self.vae_dtype)
        transformer = self._read_transformer() if shard is None else self._stream_transformer(shard)
        if self.adapter is None:
            transformer.requires_grad_(True)
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

    def _read_transformer(self) -> FluxTransformer2DModel:
        transformer = load_whole(FluxTransformer2DModel, *self.start_place, torch_dtype=self.dtype)
        if self.quantize != "none":
            for _, block in blocks(transformer):
                keep_in_4_bits(block, double=self.quantize == "nf4-double")
            transformer.is_loaded_in_4bit = True  # peft asks
        if self.adapter is not None:
            adapters.add(transformer, self.adapter, blocks(transformer))
        self._prepare_blocks(transformer)
        return transformer

    def _stream_transformer(self, shard: Shard) -> FluxTransformer2DModel:
        transformer = self.outline()
        self._prepare_blocks(transformer)
        shard(transformer, [block for _, block in blocks(transformer)])
        self._fill(transformer)
        return transformer

    def outline(self) -> FluxTransformer2DModel:
        """The transformer on the meta device: the names, shapes and dtypes of its weights and of its adapters'."""
        transformer = self._empty_transformer().to(self.dtype)
        if self.adapter is not None:
            adapters.add(transformer, self.adapter, blocks(transformer))
        return transformer

    def restart(self) -> None:
        """The published weights or those of `transformer`; adapters that change nothing yet, or those to start from."""
        assert self.transformer is not None, "load() comes first"
        if self.adapter is None:
            self._fill(self.transformer)
        else:
            adapters.start(self.transformer, self.adapter)

    def _fill(self, transformer: FluxTransformer2DModel) -> None:
        files = safetensors_files(*self.start_place, STEM)
        stream_into(adapters.base_parameters(transformer), files)

    def _prepare_blocks(self, transformer: FluxTransformer2DModel) -> None:
        if self.attention is not None:
            transformer.set_attention_backend(self.attention)
        if self.compiles_blocks:
            compile_blocks(block for _, block in blocks(transformer))

    def _empty_transformer(self) -> FluxTransformer2DModel:
        with init_empty_weights(include_buffers=False):
            return FluxTransformer2DModel.from_config(self.configs["transformer"])

    def forward(self, x: Packed, sigma: Float[Tensor, " B"], conditions: Conditions, guidance: float) -> Packed:
        """The velocity at `x`; `guidance` is the distilled one, ignored by models that have no embedding for it.

        Under autocast the level and the guidance that are told are rounded to its dtype, unless `exact_conditioning`.
        """
        assert self.transformer is not None, "load() comes first"
        if self.quantize_timesteps:
            sigma = (sigma * 1000).trunc() / 1000
        told = [sigma, torch.full_like(sigma, guidance)] if self.guided else [sigma]
        with _unrounded(self.transformer, told) if self.exact_conditioning else nullcontext():
            velocity: Tensor = self.transformer(
                hidden_states=x,
                timestep=sigma,
                guidance=told[1] if self.guided else None,
                encoder_hidden_states=conditions.prompt_embeds.to(x.dtype),
                pooled_projections=conditions.pooled_prompt_embeds.to(x.dtype),
                txt_ids=x.new_zeros(conditions.prompt_embeds.shape[1], 3),
                img_ids=image_ids(conditions.size or self.size, x),
                return_dict=False,
            )[0]
        return velocity.to(x.dtype)

    @contextmanager
    def rolling_out(self) -> Iterator[None]:
        """With the cache of features, if there is to be one."""
        if self.rollout_cache is None:
            yield
            return
        assert self.transformer is not None, "load() comes first"
        self.transformer.enable_cache(FirstBlockCacheConfig(threshold=self.rollout_cache))
        try:
            with self.transformer.cache_context("rollout"):
                yield
        finally:
            self.transformer.disable_cache()

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

    @property
    def guided(self) -> bool:
        """Whether the model embeds a distilled guidance (FLUX.1-dev does, FLUX.1-schnell does not)."""
        return bool(self.configs["transformer"].get("guidance_embeds", False))

    def latent_shape(self, size: Size | None = None) -> tuple[int, int]:
        """(L, C)."""
        height, width = size or self.size
        tokens = (height // IMAGE_PX_PER_TOKEN) * (width // IMAGE_PX_PER_TOKEN)
        return tokens, self.configs["transformer"].get("in_channels", 64)

    def decode(self, latents: Packed, size: Size | None = None) -> Images:
        """Packed clean latents to images in [0, 1], with gradient."""
        config = self.vae.config
        z = unpack(latents, size or self.size) / config.scaling_factor + (config.shift_factor or 0.0)
        decoded: Tensor = self.vae.decode(z.to(self.vae_dtype), return_dict=False)[0]
        return (decoded.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def sigmas(self, num_steps: int, shift: float | None = None, size: Size | None = None) -> Float[Tensor, " N"]:
        """The noise levels of the model's own scheduler, or of a given `shift`."""
        if shift is None:
            scheduler = self.configs["scheduler"]
            dynamic = self.resolution_shift
            if dynamic is None:
                dynamic = scheduler.get("use_dynamic_shifting", False)
            tokens = self.latent_shape(size)[0]
            shift = resolution_dependent_shift(tokens, scheduler) if dynamic else scheduler["shift"]
        return flow.schedule(num_steps, shift)

    @property
    def fingerprint(self) -> str:
        """The transformer's architecture, as its configuration gives it, and the adapter's."""
        architecture = {k: v for k, v in self.configs["transformer"].items() if not k.startswith("_")}
        if self.adapter is not None:
            architecture["adapter"] = self.adapter.architecture
            if self.start is not None:
                architecture["beside"] = same_files(safetensors_files(*self.start_place, STEM).values())
        return f"{type(self).__name__} {json.dumps(architecture, sort_keys=True)}"


@contextmanager
def _unrounded(transformer: FluxTransformer2DModel, told: list[Tensor]) -> Iterator[None]:
    """Give the embedding of level and guidance what was told, in place of what the transformer rounded.

    The transformer casts both to the dtype of its first activations before it embeds them (diffusers,
    FluxTransformer2DModel.forward); in thousandths, as there.
    """

    def replace(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*(number.float() * 1000 for number in told), *arguments[len(told) :])

    handle = transformer.time_text_embed.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _transformer_config(pretrained: str, start: str | None) -> dict[str, Any]:
    base = read_json(pretrained, "transformer", "config.json")
    if start is None:
        return base
    folder = Path(start).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"model.policy.init_args.transformer is {start}, which holds no config.json: give a transformer's own "
            "folder, as `export` writes it with --format diffusers; a pipeline's is its transformer/"
        )
    config = read_json(start, "", "config.json")
    for name in ("in_channels", "joint_attention_dim", "pooled_projection_dim"):
        if config.get(name) != base.get(name):
            raise ValueError(
                f"model.policy.init_args.transformer is {start}, whose {name} is {config.get(name)} where that of "
                f"pretrained is {base.get(name)}: give a transformer that was made from the model in pretrained"
            )
    return config


def _check_compiled(adapter: Lora | None, rollout_cache: float | None) -> None:
    if adapter is not None and adapter.dora:
        raise ValueError("peft's DoRA cannot be compiled: set model.policy.init_args.compile or adapter.dora to false")
    if rollout_cache is not None:
        raise ValueError(
            "a cache of features comes and goes with every rollout, and compiled blocks would be compiled anew for "
            "each: set model.policy.init_args.compile to false, or rollout_cache to null"
        )


def blocks(transformer: FluxTransformer2DModel) -> list[tuple[str, nn.Module]]:
    """The double and the single blocks by name: what is sharded, adapted and quantized one by one."""
    lists = ("transformer_blocks", "single_transformer_blocks")
    return [(f"{name}.{i}", block) for name in lists for i, block in enumerate(getattr(transformer, name))]


def resolution_dependent_shift(num_tokens: int, scheduler: dict[str, Any]) -> float:
    """FLUX.1's shift for a picture of `num_tokens` packed tokens.

    Source: `calculate_shift` and `time_shift` of diffusers' FluxPipeline and FlowMatchEulerDiscreteScheduler:
    mu is linear in the number of tokens and the shift is exp(mu).
    """
    few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return math.exp(low + (high - low) * (num_tokens - few) / (many - few))


def pack(z: Spatial) -> Packed:
    """2 x 2 patches of the VAE's latents to tokens, in the channel order of FLUX."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(x: Packed, size: Size) -> Spatial:
    """Undo `pack` for a picture of that size."""
    h, w = (side // IMAGE_PX_PER_TOKEN for side in size)
    b, _, c = x.shape
    return x.view(b, h, w, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * h, 2 * w)


def image_ids(size: Size, like: Tensor) -> Float[Tensor, "L 3"]:
    """Position ids of the image tokens: (0, row, column)."""
    h, w = (side // IMAGE_PX_PER_TOKEN for side in size)
    # Made where they are read: a copy to a GPU would make the host wait at every step of a rollout.
    rows, columns = torch.meshgrid(
        torch.arange(h, device=like.device), torch.arange(w, device=like.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3).to(like)
