"""Where a model's files are: a local folder in the diffusers layout, or a hub id."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError


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
