"""`stand-in`: a folder in a published model's geometry with random weights, to try a run before it is downloaded."""

import json
import math
import shutil
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import diffusers
import torch
import transformers
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from srpo_lightning.files.checkpoints import complete_or_absent_folder
from srpo_lightning.files.full_disk import FullDiskError
from srpo_lightning.files.owners import discard
from srpo_lightning.jobs.convert import processor_config
from srpo_lightning.jobs.estimate.published import REWARDS, small_files, write_files
from srpo_lightning.jobs.export.streaming import write_shards
from srpo_lightning.jobs.export.weights import Stored
from srpo_lightning.jobs.letters import BY_CLASS
from srpo_lightning.policies import AutoPolicy, loading
from srpo_lightning.policies.family import families
from srpo_lightning.policies.flow_policy import FlowPolicy

GB = 10**9


class Component(NamedTuple):
    """A model of a folder, without memory.

    Args:
        subfolder: Folder of its files.
        stem: Beginning of the weight files' names.
        model: Model on the meta device.
    """

    subfolder: str
    stem: str
    model: Any

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it: each tensor once, where layers share one."""
        once: dict[int, str] = {}
        named = self.model.state_dict(keep_vars=True)
        for name, tensor in named.items():
            once.setdefault(id(tensor), name)
        return {name: named[name] for name in once.values()}

    @property
    def num_weights(self) -> int:
        """Numbers in all of them."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def stand_in(
    model: str,
    output: str,
    text_encoder_layers: PositiveInt | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    seed: NonNegativeInt = 0,
) -> None:
    """Write a folder like a published model's, with random weights, tensor by tensor; its pictures are noise.

    Args:
        model: Hub id of a published policy or reward whose geometry is known here, such as
            black-forest-labs/FLUX.1-dev or xswu/HPSv2.
        output: Folder to write, for a policy or reward to take as `pretrained`.
        text_encoder_layers: Number of layers of the largest text encoder; null keeps all.
        dtype: Numbers that the weights are written in.
        seed: Seed of the weights.

    Raises:
        ValueError: naming the cure, if the model is not known, the output exists, or the disk has too little room.
    """
    folder = Path(output).expanduser()
    files = small_files(model)
    if files is None:
        known = [*REWARDS, *(name for family in families() for name in family.published)]
        raise ValueError(f"the geometry of {model} is not known here: choose of {', '.join(known)}")
    if folder.exists():
        raise ValueError(f"{folder} exists already: name another output, or delete it")
    with complete_or_absent_folder(folder) as partial_folder:
        write_files(partial_folder, files)
        try:
            chosen = [reward(partial_folder)] if model in REWARDS else [*pipeline(partial_folder, text_encoder_layers)]
        except ValueError:  # what is refused before a weight is written leaves nothing to look at
            discard(partial_folder)
            raise
        check_room(folder, sum(component.num_weights for component in chosen) * getattr(torch, dtype).itemsize)
        for component in chosen:
            write_weights(partial_folder, component, getattr(torch, dtype), seed)
        (partial_folder / "README.md").write_text(readme(model, chosen, dtype, seed), encoding="utf-8")
    for component in chosen:
        print(f"{component.subfolder or type(component.model).__name__}: {component.num_weights:,} weights")
    print(folder)


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuse what has no room on the disk.

    Raises:
        FullDiskError: with the sizes.
    """
    free = shutil.disk_usage(folder.parent).free
    if num_bytes > free:
        raise FullDiskError(
            f"{folder} would take {num_bytes / GB:.1f} GB, and {free / GB:.1f} GB are free there: make room, name "
            "another output, or give fewer text_encoder_layers"
        )


def reward(folder: Path) -> Component:
    """A CLIP with what its processor needs."""
    config = transformers.CLIPConfig.from_pretrained(folder)
    config.architectures = ["CLIPModel"]
    write_files(folder, {"preprocessor_config.json": processor_config(config.vision_config.image_size)})
    BY_CLASS["CLIPTokenizer"](config.text_config.max_position_embeddings).save_pretrained(folder)
    config.save_pretrained(folder)
    with torch.device("meta"):
        return Component("", "model", transformers.CLIPModel(config))


def pipeline(folder: Path, text_encoder_layers: int | None) -> Iterator[Component]:
    """The models of a pipeline, whose small files are in the folder; the other ones are written beside them."""
    policy: FlowPolicy = new_policy(folder)
    encoder = policy.text_encoder
    index: dict[str, Any] = {"_class_name": policy.pipeline_class, "_diffusers_version": diffusers.__version__}
    for name, cls in (("transformer", policy.transformer_class), ("vae", policy.vae_class)):
        path = folder / name / "config.json"
        made = loading.empty(getattr(diffusers, cls), json.loads(path.read_text(encoding="utf-8")))
        made.save_config(path.parent)
        index[name] = ["diffusers", cls]
        yield Component(name, loading.STEM, made)
    named = policy.configs["scheduler"].get("_class_name", "FlowMatchEulerDiscreteScheduler")
    scheduler = getattr(diffusers, named).from_config(policy.configs["scheduler"])
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    for name, cls in encoder.tokenizer_classes.items():
        path = folder / name / "tokenizer_config.json"
        stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"model_max_length": 77}
        BY_CLASS[cls](stated["model_max_length"]).save_pretrained(folder / name)
        index[name] = ["transformers", cls]
    for name, cls in encoder.model_classes.items():
        layers = text_encoder_layers if name == encoder.quantized else None
        yield text_model(folder / name, getattr(transformers, cls), layers, least_layers(policy))
        index[name] = ["transformers", cls]
    path = folder / "model_index.json"
    own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(index | own, indent=2), encoding="utf-8")


def new_policy(folder: Path) -> Any:
    """A policy of the family that the folder's transformer belongs to, without weights."""
    return AutoPolicy(str(folder))  # type: ignore[abstract]  # makes the family's class


def least_layers(policy: FlowPolicy) -> int:
    """Layers that the text features are read from, at least."""
    return max(policy.text_encoder.layers_read(policy.pretrained), default=1)


def text_model(folder: Path, cls: Any, layers: int | None, least: int) -> Component:
    """A text encoder; with fewer layers if so asked.

    Raises:
        ValueError: naming the setting, if features are read from more layers.
    """
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if layers is not None and layers < least:
        raise ValueError(f"text_encoder_layers is {layers}, and features are read from layer {least}: give as many")
    if layers is not None:
        own = content.get("text_config", content)
        own["num_layers" if "num_layers" in own else "num_hidden_layers"] = int(layers)
    config = cls.config_class(**content)
    config.architectures = [cls.__name__]
    config.save_pretrained(folder)
    with torch.device("meta"):
        return Component(folder.name, "model", cls(config))


def write_weights(folder: Path, component: Component, dtype: torch.dtype, seed: int) -> None:
    """A component's safetensors files, its tensors drawn when they are written."""
    stored = {
        name: Stored(
            tuple(tensor.shape),
            partial(drawn, name, tuple(tensor.shape), seed),
            None if tensor.is_floating_point() else tensor.dtype,
        )
        for name, tensor in component.tensors.items()
    }
    write_shards(folder / component.subfolder, component.stem, stored, dtype)


def drawn(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers that keep activations in their size: ones for scales, zeros for biases, matrices by their inputs."""
    kind = name.rpartition(".")[2]
    if len(shape) < 2 or kind == "gamma":
        return torch.ones(shape) if kind in ("weight", "gamma", "running_var", "scale") else torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(shape, generator=generator).mul_(1 / math.sqrt(math.prod(shape[1:])))


def readme(model: str, components: list[Component], dtype: str, seed: int) -> str:
    """What the folder is."""
    rows = [f"| {own.subfolder or 'model'} | {type(own.model).__name__} | {own.num_weights:,} |" for own in components]
    return "\n".join(
        [
            f"# A stand-in for {model}",
            "",
            f"The geometry of {model} with random weights ({dtype}, seed {seed}), by `srpo_lightning stand-in`: for",
            "trying memory, speed and commands. Its pictures are noise, and its tokenizers split texts into letters.",
            "",
            "| folder | class | weights |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
