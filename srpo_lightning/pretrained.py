"""Where a model's files are: a local folder in the diffusers layout, or a hub id."""

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


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
                f"{path} is missing: pretrained must be a whole model folder, for a FLUX policy with model_index.json, "
                "transformer/, vae/, scheduler/ and both text encoders, as FluxPipeline.save_pretrained writes it"
            )
        return str(path)
    try:
        return hf_hub_download(pretrained, filename, subfolder=subfolder or None)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"pretrained is {pretrained!r}, which is neither a folder here ({folder.resolve()}) nor a hub model that "
            f"could be fetched ({type(error).__name__}): give the path of a downloaded model folder, "
            "or a hub id such as black-forest-labs/FLUX.1-dev (gated: log in with `hf auth login` first)"
        ) from error


def weights_file(pretrained: str, filename: str) -> Path:
    """The local path of a published weight file: `pretrained` itself, or `filename` in that folder or hub model."""
    path = Path(pretrained).expanduser()
    return path if path.is_file() else Path(part(pretrained, "", filename))


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
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise OSError(str(error).splitlines()[0] if str(error) else "end of file") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict, tensors by name: give the published weight file as it is")
    return state


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Give a model its weights, all of them and no others; they take the place of its parameters, dtype included.

    Raises:
        ValueError: listing the first differences, if the weights are another model's.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    missing, unexpected = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    reshaped = sorted(name for name in own.keys() & found.keys() if own[name] != found[name])
    if missing or unexpected or reshaped:
        differences = [
            f"{len(names)} {kind}, first {', '.join(names[:3])}"
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            if names
        ]
        raise ValueError(
            f"{source} is not the weight file of {type(model).__name__} ({'; '.join(differences)}): "
            "give the file or the class that belongs to it"
        )
    model.load_state_dict(state, assign=True)


def read_json(pretrained: str, subfolder: str, filename: str) -> dict[str, Any]:
    """A configuration file of a model."""
    with unreadable_is_refused(pretrained):
        return dict(json.loads(Path(part(pretrained, subfolder, filename)).read_text(encoding="utf-8")))


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
