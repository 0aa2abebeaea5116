"""Where a model's files are: a local folder in the diffusers layout, or a hub id."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError


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
