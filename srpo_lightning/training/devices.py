"""Whether a device that a setting names is here."""

import torch

from srpo_lightning.errors import naming


def chosen_device(device: str) -> str:
    """A job's device; `auto` is a GPU if there is one.

    Raises:
        ValueError: naming the setting and the cure, if it is not here.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    check_device("device", chosen)
    return chosen


def check_device(setting: str, device: str | torch.device) -> None:
    """Refuse a device that computes nothing here, before anything is read for it.

    Raises:
        ValueError: naming the setting and the cure.
    """
    with naming(f"{setting} is {device}"):
        torch.device(device)
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        told = str(error).partition("\n")[0]
        raise ValueError(
            f"{setting} is {device}, with which nothing can be computed here ({told}): set it to cpu, or to a device "
            "that this machine has"
        ) from error
