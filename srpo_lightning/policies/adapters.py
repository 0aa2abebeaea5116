"""LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353) and rsLoRA (arXiv 2312.03732) on a transformer, by peft."""

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt
from torch import Tensor, nn

from srpo_lightning.draws import keyed_generator
from srpo_lightning.files.pretrained import own_part, stream_into
from srpo_lightning.policies.lora_file import PREFIX, LoraFile

NAME = "default"  # of the adapter, in peft

LEFT_ALONE = ("norm", "adaLN_modulation", "img_mod", "txt_mod", "modulation")
"""Beginnings of the parts of a path in a block that no adapter goes to: they scale and shift activations."""


@dataclass
class Lora:
    """What is trained beside the frozen weights of a policy's linear layers: W + scale B A, B being zero at first.

    FLUX.1's default layers have 4.09 million adapter weights per rank: 131 million, 0.52 GB, at rank 32.

    Args:
        rank: number of columns of B and rows of A.
        alpha: numerator of the scale, alpha / rank, or alpha / sqrt(rank) with rslora. Null is the rank: a scale of 1
            without rslora. Exported files have the scale in B, for programs that ignore alpha.
        target_modules: ends of the names of the blocks' linear layers that get an adapter, such as to_q or
            transformer_blocks.3.ff.net.2; null is every projection of attention and MLP.
        dropout: share of the adapters' inputs that is zero in the trained step. It is drawn from torch's global
            generator: with it a resumed run is not the unbroken one bit for bit.
        dora: whether the length of each row of the weights is trained apart from its direction; slower.
        rslora: whether the scale is alpha / sqrt(rank), which keeps large ranks learning.
        seed: seed of A's random start.
        pretrained: LoRA to start from, of this kind and these layers: a folder or hub id with
            pytorch_lora_weights.safetensors, such as `export --format lora` wrote. Null starts from no change.
    """

    rank: PositiveInt = 32
    alpha: PositiveFloat | None = None
    target_modules: list[str] | None = None
    dropout: ClosedUnitInterval = 0.0
    dora: bool = False
    rslora: bool = False
    seed: int = 0
    pretrained: str | None = None

    def __post_init__(self) -> None:
        """Refuse an adapter that could not learn."""
        if self.target_modules == []:
            raise ValueError("adapter.target_modules is []: name at least one layer, or leave it out for all of them")
        if self.dropout == 1:
            raise ValueError("adapter.dropout is 1, with which the adapter sees nothing: set it below 1, or to 0")

    @property
    def scale(self) -> float:
        """Of B A."""
        return float(self.alpha or self.rank) / (math.sqrt(self.rank) if self.rslora else self.rank)

    def architecture(self, layers: Sequence[str]) -> dict[str, Any]:
        """What the trained weights mean anything with.

        Args:
            layers: ends of the names of the layers that get an adapter where `target_modules` names none.
        """
        return {
            "rank": self.rank,
            "alpha": float(self.alpha or self.rank),
            "target_modules": sorted(self.target_modules or layers),
            "dora": self.dora,
            "rslora": self.rslora,
        }

    def check(self, blocks: Iterable[tuple[str, nn.Module]], idle: tuple[str, ...] = ()) -> None:
        """Refuse what could not be added to a model with these named blocks; they may be on the meta device.

        Args:
            blocks: by name.
            idle: beginnings of the names of layers that no gradient reaches.

        Raises:
            ValueError: with the command that installs peft, with the names that there are, or with the settings that
                `pretrained` was made with.
        """
        if find_spec("peft") is None:
            raise ValueError("an adapter needs peft: pip install 'srpo-lightning[lora]'")
        blocks = list(blocks)
        targets = self.targets(blocks, idle)
        if self.pretrained is not None:
            layers = {f"{prefix}.{name}": layer for prefix, block in blocks for name, layer in block.named_modules()}
            self._check_pretrained({name: layers[name] for name in targets})

    def _check_pretrained(self, layers: Mapping[str, Any]) -> None:
        file = LoraFile.read(self.pretrained or "")
        expected: dict[str, list[int]] = {}
        for name, layer in layers.items():
            rows, columns = layer.weight.shape
            expected |= {f"{name}.lora_A.weight": [self.rank, columns], f"{name}.lora_B.weight": [rows, self.rank]}
            expected |= {f"{name}.lora_magnitude_vector": [rows]} if self.dora else {}
        odd = [name for name in {**file.shapes, **expected} if file.shapes.get(name) != expected.get(name)]
        if odd:
            raise ValueError(
                f"adapter.pretrained is {self.pretrained}, whose LoRA differs in {len(odd)} tensors from the one that "
                f"model.policy.init_args.adapter describes, first {odd[0]}: found {file.shapes.get(odd[0])}, expected "
                f"{expected.get(odd[0])}; set rank, dora and target_modules as they were when it was trained"
            )

    def targets(self, blocks: Iterable[tuple[str, nn.Module]], idle: tuple[str, ...] = ()) -> list[str]:
        """The names of the linear layers that get an adapter, idle ones left out.

        Raises:
            ValueError: listing the names that there are, if one of `target_modules` is the end of none.
        """
        linear = [(full, name) for full, name in _linear_layers(blocks) if not f"{full}.".startswith(idle)]
        if self.target_modules is None:
            return [full for full, name in linear if _is_projection(name)]
        found: dict[str, None] = {}
        for end in self.target_modules:
            own = [full for full, _ in linear if f".{full}".endswith(f".{end}")]
            if not own:
                raise ValueError(
                    f"target_modules has {end!r}, with which the name of no linear layer in the model's blocks ends: "
                    f"choose from {', '.join(sorted({name for _, name in linear}))}, or put the block before it, as in "
                    f"{linear[0][0]}"
                )
            found |= dict.fromkeys(own)
        return list(found)


def ends(blocks: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """The layers of `Lora.targets` by default, as short as names go: to_q for each attn.to_q of a block."""
    inner = {name for _, name in _linear_layers(blocks) if _is_projection(name)}
    return sorted({name.partition(".")[2] or name for name in inner})


def _linear_layers(blocks: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, str]]:
    """The linear layers of blocks, by their names in the model and in the block."""
    return [
        (f"{prefix}.{name}", name)
        for prefix, block in blocks
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    ]


def _is_projection(name: str) -> bool:
    """Whether a linear layer, by its name in a block, is one of attention or MLP."""
    return not any(part.startswith(LEFT_ALONE) for part in name.split("."))


def add(transformer: Any, lora: Lora, blocks: Iterable[tuple[str, nn.Module]], idle: tuple[str, ...] = ()) -> None:
    """Give a transformer adapters in float32, on the meta device where it is there, and freeze the rest."""
    peft: Any = importlib.import_module("peft")
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=float(lora.alpha or lora.rank),
        target_modules=lora.targets(blocks, idle),
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws what `start` draws again
        transformer.add_adapter(config, NAME)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if lora.dropout:
        for _, layer in _adapted(transformer):
            layer.lora_dropout[NAME] = TrainedStepDropout(lora.dropout)


@torch.no_grad()
def start(transformer: Any, lora: Lora) -> None:
    """Let the adapters be those of `lora.pretrained`, or change nothing yet.

    Then A is a function of the seed and the layer's name, on any number of ranks.
    """
    if lora.pretrained is not None:
        _read(transformer, lora, LoraFile.read(lora.pretrained))
        return
    for name, layer in _adapted(transformer):
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        # Lightning loads models with the GPU as torch's default device; numbers are drawn on the CPU.
        drawn, generator = torch.empty(a.shape, dtype=a.dtype, device="cpu"), keyed_generator(lora.seed, "lora", name)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        local, rows = own_part(a)
        local.copy_(drawn[rows])
        b.zero_()
        if lora.dora:
            integrations: Any = importlib.import_module("peft.utils.integrations")
            weight = integrations.dequantize_module_weight(layer.get_base_layer())
            layer.lora_magnitude_vector[NAME].weight.copy_(torch.linalg.vector_norm(weight.float(), dim=1))


def _read(transformer: nn.Module, lora: Lora, file: LoraFile) -> None:
    parameters = {_in_file(name): p for name, p in transformer.named_parameters() if ".lora_" in name}
    stream_into(
        {f"{PREFIX}{name}": parameter for name, parameter in parameters.items()},
        {f"{PREFIX}{name}": file.path for name in file.shapes},
    )
    for name, scale in file.scales.items():
        parameters[name].mul_(scale / lora.scale)


def _in_file(name: str) -> str:
    return name.replace(f".{NAME}.weight", "" if ".lora_magnitude_vector." in name else ".weight")


def base_tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """The parameters and kept buffers by the names that they have without adapters, and without the adapters' own."""
    named = {name: p for name, p in transformer.named_parameters() if ".lora_" not in name}
    for prefix, module in transformer.named_modules():
        kept = module._buffers.keys() - module._non_persistent_buffers_set  # torch tells by no public name
        for name in kept:
            if (buffer := module._buffers[name]) is not None:
                named[f"{prefix}.{name}".removeprefix(".")] = buffer
    return {name.replace(".base_layer.", "."): tensor for name, tensor in named.items()}


@torch.no_grad()
def merged(weight: Tensor, lora: Lora, own: Mapping[str, Tensor]) -> Tensor:
    """A layer's weight with its adapter in it, in float32: W + scale B A, with DoRA's lengths of rows.

    Args:
        weight: [rows, columns] of the base.
        lora: of which kind the adapter is.
        own: the layer's adapter, by peft's names.
    """
    parts = {name.split(".lora_")[1].split(".")[0]: tensor.float() for name, tensor in own.items()}
    total = weight.float() + lora.scale * parts["B"] @ parts["A"]
    if lora.dora:
        total *= (parts["magnitude_vector"] / torch.linalg.vector_norm(total, dim=1))[:, None]
    return total


def scaled(name: str, tensor: Tensor, scale: float) -> Tensor:
    """An adapter's tensor, in float32, as it acts without a scale.

    Programs that read an adapter have rules of their own for alpha, or none.

    Args:
        name: of the tensor.
        tensor: of it.
        scale: of B A.
    """
    return tensor.float() * scale if ".lora_B." in name else tensor.float()


def save_lora(
    pipeline_class: str,
    transformer: Any,
    weights: Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `pytorch_lora_weights.safetensors` for the pipeline's `load_lora_weights`; the scale is in B.

    Args:
        pipeline_class: the pipeline's class in diffusers.
        transformer: a transformer with adapters, on the meta device where it is there.
        weights: the adapters', whole, by their names in `transformer`, whose adapters' own values play no part.
        folder: made if need be.
        dtype: of the file.
    """
    peft: Any = importlib.import_module("peft")
    config = transformer.peft_config[NAME]
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    own = {name: scaled(name, tensor, scale).to(dtype) for name, tensor in weights.items()}
    getattr(diffusers, pipeline_class).save_lora_weights(
        folder,
        transformer_lora_layers=peft.get_peft_model_state_dict(transformer, own, adapter_name=NAME),
        transformer_lora_adapter_metadata={**config.to_dict(), "lora_alpha": config.r, "use_rslora": False},
    )


class TrainedStepDropout(nn.Dropout):
    """Dropout that leaves rollouts, which have no gradient, alone."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself, where no gradient is asked for."""
        return super().forward(x) if torch.is_grad_enabled() else x


def _adapted(transformer: nn.Module) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in transformer.named_modules() if hasattr(layer, "lora_A")]
