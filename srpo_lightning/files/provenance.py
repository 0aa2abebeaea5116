"""Which code made a file."""

import subprocess
from functools import lru_cache
from pathlib import Path

from srpo_lightning import __version__


@lru_cache(maxsize=1)
def revision() -> str | None:
    """The git revision of this project, `-dirty` where files differ from it; None if it is not in a repository."""
    repository = Path(__file__).parents[2]
    if not (repository / ".git").exists():
        return None
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def software() -> str:
    """This package's version, and its revision where it is known."""
    found = revision()
    return f"srpo_lightning {__version__}{f' ({found})' if found else ''}"
