"""Where a model's files are: a local folder in the diffusers layout, or a hub id."""

import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from srpo_lightning.files.crc import crc32
from srpo_lightning.files.fingerprint import ends
from srpo_lightning.files.published_sums import check_sum

Model = TypeVar("Model")

LOCAL_HEADER = struct.Struct("<4s22xHH")
"""The beginning of a part of a zip archive: its mark, and the lengths of its name and of what comes behind that.

Source: APPNOTE.TXT of PKWARE, section 4.3.7.
"""

UNPICKLING = (
    RuntimeError,
    LookupError,
    EOFError,
    TypeError,
    AttributeError,
    AssertionError,
    ValueError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)
"""How a damaged pickle ends: it is a program, also for an unpickler that takes nothing but tensors from it."""


def part(pretrained: str, subfolder: str, filename: str) -> str:
    """The local path of one small file of a model, fetched from the hub if need be.

    Raises:
        ValueError: naming the cure, if there is no such folder, file or hub model.
    """
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        path = folder / subfolder / filename
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: give a whole model folder as it was published; a FLUX policy's holds "
                "model_index.json, transformer/, vae/, scheduler/ and both text encoders"
            )
        check_sum(path)
        return str(path)
    try:
        fetched: str = hf_hub_download(pretrained, filename, subfolder=subfolder or None)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{pretrained!r} is neither a folder here ({folder.resolve()}) nor a hub model that "
            f"could be fetched ({type(error).__name__}): give the path of a downloaded model folder, or a hub id "
            "(for a gated model such as black-forest-labs/FLUX.1-dev log in with `hf auth login` first)"
        ) from error
    check_sum(Path(fetched))
    return fetched


def weights_file(pretrained: str, filename: str) -> Path:
    """The local path of a published weight file: `pretrained` itself, or `filename` in that folder or hub model."""
    path = Path(pretrained).expanduser()
    if not path.is_file():
        return Path(part(pretrained, "", filename))
    check_sum(path)
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, of a safetensors file or of a pickle, from which nothing but tensors is taken.

    A pickle that holds its weights under `state_dict` is read from there.

    Raises:
        ValueError: naming the cure, if the file is damaged or holds something else.
    """
    with unreadable_is_refused(str(path)):
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            is_archive = zipfile.is_zipfile(path)
            if is_archive:
                check_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        except UNPICKLING as error:
            raise OSError(str(error).splitlines()[0] if str(error) else "end of file") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict, tensors by name: give the published weight file as it is")
    return state


def check_archive(path: Path) -> None:
    """Refuse a file of torch.save of which a part has another CRC-32 than it was written with.

    Raises:
        BadZipFile: naming the part; as `ZipFile.testzip`, only faster.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile("it is compressed, as torch.save never does")
            stream.seek(part.header_offset)
            magic, name_length, extra_length = LOCAL_HEADER.unpack(stream.read(LOCAL_HEADER.size))
            name = stream.read(name_length).decode(errors="replace")
            stream.seek(extra_length, os.SEEK_CUR)
            if (magic, name) != (b"PK\x03\x04", part.filename) or crc32(stream, part.file_size) != part.CRC:
                raise zipfile.BadZipFile(f"{part.filename} in it has another sum than it was written with")


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Give a model its weights, all of them and no others; they take the place of its parameters, dtype included.

    Raises:
        ValueError: listing the first differences, if the weights are another model's.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    reshaped = [name for name in own.keys() & found.keys() if own[name] != found[name]]
    differences = _differences(own.keys() - found.keys(), found.keys() - own.keys(), reshaped)
    if differences:
        raise ValueError(
            f"{source} is not the weight file of {type(model).__name__} ({differences}): "
            "give the file or the class that belongs to it"
        )
    model.load_state_dict(state, assign=True)


def read_by(cls: Any, pretrained: str, subfolder: str = "", **settings: Any) -> Any:
    """What a class of diffusers or transformers reads from a model: a tokenizer, a configuration, weights.

    Args:
        cls: Class with `from_pretrained`.
        pretrained: Folder, which may begin with `~`, or hub id.
        subfolder: Folder within `pretrained`.
        settings: Further arguments for `from_pretrained`.

    Raises:
        ValueError: naming the cure, if files are missing or damaged.
    """
    folder = Path(pretrained).expanduser()
    with unreadable_is_refused(pretrained):
        return cls.from_pretrained(str(folder) if folder.is_dir() else pretrained, subfolder=subfolder, **settings)


def load_whole(
    cls: type[Model], pretrained: str, subfolder: str = "", unread: Sequence[str] = (), **settings: Any
) -> Model:
    """A model of diffusers or transformers with its weights, all of them and no others.

    Left to themselves the libraries fill what a folder lacks with random numbers, or leave it without memory.

    Args:
        cls: Class with `from_pretrained`.
        pretrained: Folder or hub id.
        subfolder: Folder of the model within `pretrained`.
        unread: Beginnings of the names of tensors that the folder may hold beside the model's own.
        settings: Arguments for `from_pretrained`.

    Raises:
        ValueError: naming the folder and the first differences, or what is damaged.
    """
    stem = "diffusion_pytorch_model" if cls.__module__.startswith("diffusers.") else "model"
    safetensors_files(pretrained, subfolder, stem)  # they are there, and have the sums that they were published with
    model, info = read_by(
        cls,
        pretrained,
        subfolder,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # to be told of them all, below
        **settings,
    )
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith(tuple(unread))]
    reshaped = [name for name, *_ in info["mismatched_keys"]]
    _refuse(Path(pretrained) / subfolder, _differences(info["missing_keys"], unexpected, reshaped))
    whole: Model = model
    return whole


def _differences(missing: Iterable[str], unexpected: Iterable[str], reshaped: Iterable[str]) -> str:
    """In words; empty if there are none."""
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": sorted(reshaped)}
    return "; ".join(f"{len(names)} {kind}, first {', '.join(names[:3])}" for kind, names in kinds.items() if names)


def _refuse(folder: Path, differences: str) -> None:
    if differences:
        raise ValueError(
            f"{folder} holds other weights than its config.json describes ({differences}): copy or download the "
            "folder again"
        )


def safetensors_files(pretrained: str, subfolder: str, stem: str) -> dict[str, Path]:
    """Where each tensor of a model lies: in one file, or in the several that an index names."""
    index = f"{stem}.safetensors.index.json"
    try:
        names = read_json(pretrained, subfolder, index).get("weight_map")
    except ValueError:
        if (Path(pretrained).expanduser() / subfolder / index).is_file():
            raise
        path = Path(part(pretrained, subfolder, f"{stem}.safetensors"))
        with unreadable_is_refused(pretrained), safe_open(path, "pt") as file:
            return dict.fromkeys(file.keys(), path)
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(
            f"{Path(pretrained) / subfolder / index} does not say in which file each tensor is: copy or download the "
            "folder again"
        )
    paths = {name: Path(part(pretrained, subfolder, name)) for name in set(names.values())}
    return {tensor: paths[name] for tensor, name in names.items()}


@torch.no_grad()
def stream_into(parameters: Mapping[str, Tensor], files: Mapping[str, Path]) -> None:
    """Fill a model's parameters, by name, from safetensors files, tensor by tensor; of sharded ones this rank's part.

    Never more than one tensor's part is in memory besides the parameters.

    Raises:
        ValueError: naming the first differences, if the files are another model's, or damaged.
    """
    check_names(parameters, files)
    source = next(iter(files.values())).parent
    for path in dict.fromkeys(files.values()):
        with unreadable_is_refused(str(source)), safe_open(path, "pt") as file:
            for name in (name for name, own in files.items() if own == path):
                parameter, stored = parameters[name], file.get_slice(name)
                if list(parameter.shape) != stored.get_shape():
                    raise ValueError(
                        f"{path}: {name} is {stored.get_shape()}, config.json says {list(parameter.shape)}; copy or "
                        "download the folder again"
                    )
                local, rows = own_part(parameter)
                if local.numel():
                    local.copy_(stored[rows])


def check_names(parameters: Mapping[str, Tensor], files: Mapping[str, Path]) -> None:
    """Refuse files that hold other tensors than a model has.

    Raises:
        ValueError: naming the first differences.
    """
    differences = _differences(parameters.keys() - files.keys(), files.keys() - parameters.keys(), ())
    _refuse(next(iter(files.values())).parent, differences)


def own_part(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This rank's part of a parameter, and where in the whole it lies."""
    if not isinstance(parameter, DTensor):
        return parameter, (slice(None),) * parameter.ndim
    (chunk,) = parameter.__create_chunk_list__()
    places = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
    return parameter.to_local(), places


def same_files(paths: Iterable[Path]) -> str:
    """A hash that tells weight files apart: of their sizes and of the first and the last MiB of each."""
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        digest.update(f"{path.stat().st_size} ".encode() + ends(path))
    return digest.hexdigest()[:16]


def read_json(pretrained: str, subfolder: str, filename: str) -> dict[str, Any]:
    """A configuration file of a model."""
    with unreadable_is_refused(pretrained):
        path = Path(part(pretrained, subfolder, filename))
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object but a {type(content).__name__}: copy or download the folder again")
    return content


@contextmanager
def unreadable_is_refused(pretrained: str) -> Iterator[None]:
    """Turn what the libraries raise on broken or missing files into one error that names the cure."""
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the model in {pretrained} cannot be read ({type(error).__name__}: {error}): "
            "a file is missing or damaged, copy or download the folder again"
        ) from error
