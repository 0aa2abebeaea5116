"""`downloads`: what a configuration needs from the hub, how large it is, its licence, and what is here already."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from jsonargparse import Namespace

from srpo_lightning.config.arguments import read_config
from srpo_lightning.files.fingerprint import HUB_ID
from srpo_lightning.files.markdown import markdown_table
from srpo_lightning.jobs.estimate.prediction import quiet
from srpo_lightning.jobs.estimate.published import LICENCES, REWARDS, small_files, write_files
from srpo_lightning.jobs.stand_in import pipeline, reward
from srpo_lightning.rewards.hps import TOKENIZER, HPSv2, is_converted

SETTINGS = ("pretrained", "transformer", "processor", "tokenizer", "head")
"""Settings that name a file, a folder or a hub model."""

OF_TEXT = (".processor", ".tokenizer")
"""Settings of whose models the tokenizer and its like are read, of a few MB, and no weights."""

WEIGHTS = "weights"
"""Setting that names one too where it has a slash; elsewhere it is policy or ema."""

GB = 10**9


class Download(NamedTuple):
    """A model that a configuration names.

    Args:
        name: Hub id, or path of a folder or file.
        settings: Settings that name it.
        is_local: Whether it is a path of this machine.
    """

    name: str
    settings: tuple[str, ...]
    is_local: bool


def downloads(config: list[str]) -> None:
    """List what a configuration reads that is not part of this package, and what of it is here.

    Args:
        config: Configuration files and settings that `fit` would get; each changes what those before it say.

    Raises:
        ValueError: with the cure, if the configuration cannot be read.
    """
    cached = bytes_in_cache()
    rows = [
        [
            own.name,
            ", ".join(own.settings),
            "" if own.is_local else size(own),
            "" if own.is_local else LICENCES.get(own.name, "see its page"),
            f"{cached[own.name] / GB:.1f} GB in the hub cache" if own.name in cached else place(own),
        ]
        for own in wanted(read_config(*config))
    ]
    print(markdown_table(["model", "named by", "GB in bfloat16", "licence", "here"], rows))


def size(own: Download) -> str:
    """What a model of the hub takes, in GB; empty where that is not known."""
    if all(setting.endswith(OF_TEXT) for setting in own.settings):
        return "0.0, no weights"
    found = bytes_in_bfloat16(own.name)
    return "" if found is None else f"{found / GB:.1f}"


def place(own: Download) -> str:
    """Whether a model that is not in the hub's cache is here."""
    if not own.is_local:
        return "no: the first run fetches it, or hf download"
    return "yes" if Path(own.name).expanduser().exists() else "no such path"


def wanted(config: Namespace) -> list[Download]:
    """Models by name, in the order in which the configuration names them first."""
    found: dict[str, list[str]] = {}
    for setting, name in named("", config):
        found.setdefault(name, []).append(setting)
    return [Download(name, tuple(settings), not is_hub_id(name)) for name, settings in found.items()]


def named(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every setting that names a model, with what it names."""
    if isinstance(value, Namespace | dict):
        settings = vars(value) if isinstance(value, Namespace) else value
        if reads_tokenizer(settings):
            yield f"{path}.processor", TOKENIZER
        for key, own in settings.items():
            inner = path if key == "init_args" else f"{path}.{key}".lstrip(".")
            if isinstance(own, str) and (key in SETTINGS or (key == WEIGHTS and "/" in own)):
                yield inner, own
            else:
                yield from named(inner, own)
    elif isinstance(value, list):
        for own in value:
            cls = str(own.get("class_path", "")).rpartition(".")[2] if isinstance(own, Namespace | dict) else ""
            yield from named(f"{path}.{cls}".rstrip("."), own)


def reads_tokenizer(settings: Mapping[str, Any]) -> bool:
    """Whether they are of an HPSv2 that takes its tokenizer from the hub without naming it."""
    cls = resolve_name(str(settings["class_path"])) if "class_path" in settings else None
    if not (isinstance(cls, type) and issubclass(cls, HPSv2)):
        return False
    own = settings["init_args"]
    return own.get("processor") is None and not is_converted(str(own.get("pretrained")))


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the hub, and no path of this machine."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).expanduser().exists()


def bytes_in_bfloat16(name: str) -> int | None:
    """Of all weights of a published model whose geometry is known here; None of others."""
    files = small_files(name)
    if files is None:
        return None
    with tempfile.TemporaryDirectory() as folder, quiet():
        write_files(Path(folder), files)
        models = [reward(Path(folder))] if name in REWARDS else list(pipeline(Path(folder), None))
        return 2 * sum(model.num_weights for model in models)


def bytes_in_cache() -> dict[str, int]:
    """What the hub's cache holds of each model."""
    try:
        return {repo.repo_id: repo.size_on_disk for repo in scan_cache_dir().repos if repo.repo_type == "model"}
    except CacheNotFound:
        return {}
