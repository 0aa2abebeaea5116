"""What `export` can write: each format, how plain diffusers loads it, and how a person does."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from srpo_lightning.files.pretrained import part
from srpo_lightning.jobs.export.streaming import as_stored, write_file, write_shards
from srpo_lightning.jobs.export.weights import Stored, whole_transformer
from srpo_lightning.policies.adapters import NAME
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.policies.loading import STEM
from srpo_lightning.policies.single_file import SingleFile as Names


class Format(ABC):
    """The trained tensors of a policy, to be written in one format.

    Args:
        policy: Policy whose transformer is written.
        outline: Outline of that transformer.
        trained: Trained tensors by name.
        dtype: Dtype to write.
        name: Name of the folder that is written.
    """

    relation = "finetune"
    """To the base model, in the hub's words."""

    comfyui = ""
    """What to do with it there."""

    elsewhere = ""
    """Why diffusers cannot load it, and what to do."""

    def __init__(
        self,
        policy: FlowPolicy,
        outline: Any,
        trained: Mapping[str, Stored],
        dtype: torch.dtype,
        name: str,
    ) -> None:
        self.policy, self.outline, self.trained, self.dtype, self.name = policy, outline, trained, dtype, name

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the files."""

    @abstractmethod
    def python(self, folder: Path) -> list[str]:
        """The lines that make a pipeline `pipe`; imports come before."""

    def given(self, folder: Path) -> dict[str, Any]:
        """What those lines need and diffusers cannot make of the files: `transformer`, as another program makes it."""
        return {}

    @property
    def expected(self) -> dict[str, Stored]:
        """What of the pipeline's transformer is compared bit for bit, before it is written in `dtype`."""
        return {}

    def compare(self, pipeline: Any) -> None:
        """Refuse a pipeline whose transformer has not all of these weights as they were to be written.

        Raises:
            ValueError: naming the first that differs.
        """
        adapters = list(getattr(pipeline.transformer, "peft_config", {}))
        tensors = {name: tensor.cpu() for name, tensor in pipeline.transformer.state_dict().items()}
        for name, stored in tqdm(self.expected.items(), desc="comparing weights", unit="tensor"):
            found = tensors[name.replace(f".{NAME}.", f".{adapters[0]}.") if adapters else name]
            if not torch.equal(found.float(), as_stored(stored, self.dtype).float()):
                raise ValueError(
                    f"diffusers has read other weights than were written, first {name}: export again, to another disk"
                )

    def around(self, transformer: str | None) -> list[str]:
        """The lines that make the pipeline around a transformer that Python makes thus, or around the base's own."""
        own = "" if transformer is None else "transformer=transformer, "
        made = (
            f"{self.policy.pipeline_class}.from_pretrained({self.policy.pretrained!a}, {own}torch_dtype={self.dtype})"
        )
        pipe = f"pipe = {made}"
        return [f"transformer = {transformer}", pipe] if transformer else [pipe]


class Whole(Format):
    """All of the transformer's weights."""

    @cached_property
    def whole(self) -> dict[str, Stored]:
        """By diffusers' names."""
        return whole_transformer(self.policy, self.outline, self.trained)

    @property
    def expected(self) -> dict[str, Stored]:
        """All of it."""
        return self.whole

    def python(self, folder: Path) -> list[str]:
        """Around the transformer."""
        return self.around(self.python_transformer(folder))

    @abstractmethod
    def python_transformer(self, folder: Path) -> str:
        """What makes it; nothing: it is given."""


class DiffusersFolder(Whole):
    """For the transformer's `from_pretrained`."""

    def write(self, folder: Path) -> None:
        """One file, or several with an index."""
        self.outline.save_config(folder)
        write_shards(folder, STEM, self.whole, self.dtype)

    def python_transformer(self, folder: Path) -> str:
        """A line."""
        return f"{self.policy.transformer_class}.from_pretrained({str(folder)!a}, torch_dtype={self.dtype})"


class SingleFile(Whole):
    """With the names of the model's first publication, for ComfyUI and the transformer's `from_single_file`."""

    @property
    def names(self) -> Names:
        """Of the family.

        Raises:
            ValueError: if it has none.
        """
        if self.policy.single_file is None:
            raise ValueError(
                f"{type(self.policy).__name__} has no names for a single file: export with --format diffusers"
            )
        return self.policy.single_file

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
        return self.policy.reads_single_file({name: stored.shape for name, stored in self.whole.items()})

    def write(self, folder: Path) -> None:
        """One file, however large."""

        def read(name: str, parts: list[str]) -> Tensor:
            return self.names.joined(name, [self.whole[own].read() for own in parts])

        tensors = {}
        for name, parts in self.names.sources(self.whole).items():
            shape = self.names.shape(name, [self.whole[own].shape for own in parts])
            tensors[name] = Stored(shape, partial(read, name, parts))
        with tqdm(total=len(tensors), desc="weights", unit="tensor") as progress:
            write_file(folder / self.file, tensors, self.dtype, progress)

    @property
    def elsewhere(self) -> str:  # type: ignore[override]  # a constant in others
        """Of other widths."""
        if self.is_converted:
            return ""
        return (
            f"diffusers {diffusers.__version__} converts single files of the published widths alone: for it export "
            "with `--format diffusers`"
        )

    def given(self, folder: Path) -> dict[str, Any]:
        """After turning the names back here."""
        if self.is_converted:
            return {}
        tensors = load_file(folder / self.file)
        source: dict[str, Tensor] = {}
        for name, parts in self.names.sources(self.whole).items():
            rows = [self.whole[own].shape[0] for own in parts]
            source |= dict(zip(parts, self.names.divided(name, tensors.pop(name), rows), strict=True))
        place, subfolder = self.policy.start_place
        config = str(Path(part(place, subfolder, "config.json")).parent)
        return {"transformer": self.policy.diffusers_class.from_single_file(source, config=config, dtype=self.dtype)}

    def python_transformer(self, folder: Path) -> str:
        """A line."""
        if not self.is_converted:
            return ""
        place, subfolder = self.policy.start_place
        inner = f"subfolder={subfolder!a}, " if subfolder else ""
        options = f"config={place!a}, {inner}torch_dtype={self.dtype}"
        return f"{self.policy.transformer_class}.from_single_file({str(folder / self.file)!a}, {options})"
