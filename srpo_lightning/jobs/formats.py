"""What `export` can write: each format, how plain diffusers loads it, and how a person does."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path

import diffusers
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from srpo_lightning.jobs.streaming import as_stored, write_file, write_shards
from srpo_lightning.jobs.weights import Stored, whole_transformer
from srpo_lightning.policies import FluxPolicy, bfl
from srpo_lightning.policies.adapters import NAME, save_lora
from srpo_lightning.pretrained import part

CONVERTED_WIDTH = 3072
"""FLUX.1's, and the only one that diffusers' converter of single files knows."""


class Format(ABC):
    """The trained tensors of a policy, to be written in one format.

    Args:
        policy: whose transformer it is.
        outline: of that transformer.
        trained: tensors by name.
        dtype: to write.
        name: of the folder that is written.
    """

    relation = "finetune"
    """To the base model, in the hub's words."""

    comfyui = ""
    """What to do with it there."""

    def __init__(
        self,
        policy: FluxPolicy,
        outline: FluxTransformer2DModel,
        trained: Mapping[str, Stored],
        dtype: torch.dtype,
        name: str,
    ) -> None:
        self.policy, self.outline, self.trained, self.dtype, self.name = policy, outline, trained, dtype, name

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the files."""

    @abstractmethod
    def load(self, folder: Path, *, mixed: bool) -> FluxPipeline:
        """Diffusers' pipeline with the files, for prompts that are encoded already.

        Args:
            folder: where they are.
            mixed: whether autocast will compute in bfloat16; if not, all weights are made float32.

        Raises:
            ValueError: if diffusers reads other weights than were to be written.
        """

    @abstractmethod
    def python(self, folder: Path) -> list[str]:
        """The lines that make a pipeline `pipe`; imports come before."""

    def compare(self, found: FluxTransformer2DModel, expected: Mapping[str, Stored]) -> None:
        """Refuse a transformer that has not all of these weights as they were to be written, bit for bit."""
        parameters = dict(found.named_parameters())
        for name, stored in tqdm(expected.items(), desc="comparing weights", unit="tensor"):
            if not torch.equal(parameters[name].float(), as_stored(stored, self.dtype).float()):
                raise ValueError(
                    f"diffusers has read other weights than were written, first {name}: export again, to another disk"
                )


class Whole(Format):
    """All of the transformer's weights."""

    @cached_property
    def whole(self) -> dict[str, Stored]:
        """By diffusers' names."""
        return whole_transformer(self.policy, self.outline, self.trained)

    @abstractmethod
    def read(self, folder: Path) -> FluxTransformer2DModel:
        """The transformer as diffusers reads it."""

    def load(self, folder: Path, *, mixed: bool) -> FluxPipeline:
        """Around the transformer."""
        transformer = self.read(folder)
        self.compare(transformer, self.whole)
        return plain_pipeline(self.policy, transformer if mixed else transformer.float())

    def python(self, folder: Path) -> list[str]:
        """Around the transformer."""
        return [
            f"transformer = {self.python_transformer(folder)}",
            f"pipe = FluxPipeline.from_pretrained({json.dumps(self.policy.pretrained)}, transformer=transformer, "
            "torch_dtype=torch.bfloat16)",
        ]

    @abstractmethod
    def python_transformer(self, folder: Path) -> str:
        """What makes it."""


class DiffusersFolder(Whole):
    """For `FluxTransformer2DModel.from_pretrained`."""

    def write(self, folder: Path) -> None:
        """One file, or several with an index."""
        self.outline.save_config(folder)
        write_shards(folder, "diffusion_pytorch_model", self.whole, self.dtype)

    def read(self, folder: Path) -> FluxTransformer2DModel:
        """As anybody would."""
        return FluxTransformer2DModel.from_pretrained(folder, dtype=self.dtype, use_safetensors=True)

    def python_transformer(self, folder: Path) -> str:
        """A line."""
        return f"FluxTransformer2DModel.from_pretrained({json.dumps(str(folder))}, torch_dtype=torch.bfloat16)"


class SingleFile(Whole):
    """With the names of Black Forest Labs, for ComfyUI and `FluxTransformer2DModel.from_single_file`."""

    @property
    def comfyui(self) -> str:  # type: ignore[override]  # a constant in the others
        """Where to."""
        return f"put `{self.file}` into `models/diffusion_models/`, and load it with the node *Load Diffusion Model*"

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{self.name}.safetensors"

    @property
    def is_converted(self) -> bool:
        """Whether diffusers knows how."""
        return self.whole["x_embedder.bias"].shape == (CONVERTED_WIDTH,)

    def write(self, folder: Path) -> None:
        """One file, however large."""

        def read(name: str, parts: list[str]) -> Tensor:
            return bfl.joined(name, [self.whole[own].read() for own in parts])

        tensors = {}
        for name, parts in bfl.sources(self.whole).items():
            shapes = [self.whole[own].shape for own in parts]
            rows = sum(shape[0] for shape in shapes)
            tensors[name] = Stored((rows, *shapes[0][1:]), partial(read, name, parts))
        with tqdm(total=len(tensors), desc="weights", unit="tensor") as progress:
            write_file(folder / self.file, tensors, self.dtype, progress)

    def read(self, folder: Path) -> FluxTransformer2DModel:
        """As anybody would; with other widths than FLUX.1's, after turning the names back here."""
        config = str(Path(part(self.policy.pretrained, "transformer", "config.json")).parent)
        source: str | dict[str, Tensor] = str(folder / self.file)
        if not self.is_converted:
            tensors, source = load_file(folder / self.file), {}
            for name, parts in bfl.sources(self.whole).items():
                rows = [self.whole[own].shape[0] for own in parts]
                source |= dict(zip(parts, bfl.divided(name, tensors.pop(name), rows), strict=True))
        return FluxTransformer2DModel.from_single_file(source, config=config, dtype=self.dtype)

    def python(self, folder: Path) -> list[str]:
        """What does not work there is said."""
        lines = super().python(folder)
        if self.is_converted:
            return lines
        return [
            f"# diffusers {diffusers.__version__} converts files of FLUX.1's width, {CONVERTED_WIDTH}, alone",
            *lines,
        ]

    def python_transformer(self, folder: Path) -> str:
        """A line."""
        path, base = json.dumps(str(folder / self.file)), json.dumps(self.policy.pretrained)
        options = f'config={base}, subfolder="transformer", torch_dtype=torch.bfloat16'
        return f"FluxTransformer2DModel.from_single_file({path}, {options})"


class LoraFiles(Format):
    """For `FluxPipeline.load_lora_weights`."""

    relation = "adapter"
    comfyui = "put `pytorch_lora_weights.safetensors`, under a name of its own, into `models/loras/`"

    def write(self, folder: Path) -> None:
        """One file."""
        items = tqdm(self.trained.items(), desc="weights", unit="tensor")
        save_lora(self.outline, {name: as_stored(stored, self.dtype) for name, stored in items}, folder)

    def load(self, folder: Path, *, mixed: bool) -> FluxPipeline:
        """Beside the base."""
        base = FluxTransformer2DModel.from_pretrained(
            self.policy.pretrained,
            subfolder="transformer",
            dtype=self.policy.dtype if mixed else torch.float32,
            use_safetensors=True,
        )
        pipeline = plain_pipeline(self.policy, base)
        pipeline.load_lora_weights(folder, adapter_name=NAME)
        self.compare(pipeline.transformer, self.trained)
        return pipeline

    def python(self, folder: Path) -> list[str]:
        """Beside the base."""
        return [
            f"pipe = FluxPipeline.from_pretrained({json.dumps(self.policy.pretrained)}, torch_dtype=torch.bfloat16)",
            f"pipe.load_lora_weights({json.dumps(str(folder))})",
        ]


FORMATS: dict[str, type[Format]] = {"diffusers": DiffusersFolder, "single-file": SingleFile, "lora": LoraFiles}


def plain_pipeline(policy: FluxPolicy, transformer: FluxTransformer2DModel) -> FluxPipeline:
    """Diffusers' pipeline around a transformer, without text encoders."""
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return FluxPipeline.from_pretrained(
        policy.pretrained, transformer=transformer, dtype=torch.float32, use_safetensors=True, **absent
    )
