"""An export as a repository of the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

FAILURES: tuple[type[BaseException], ...] = (OSError, ValueError, HfHubHTTPError.__bases__[0])
"""What its client raises; the last is the HTTP library's own, httpx in version 1 and httpx2 in version 2."""

LEFT_OUT = "check/*"
"""Pictures that the export was checked by."""


def make_repository(repository: str, *, private: bool) -> None:
    """Make the repository before anything is exported, unless it is there: so a token that may not is found early.

    Raises:
        ValueError: in one line, if the hub refuses or cannot be reached.
    """
    with told(f"--push_to_hub {repository}", "log in with `hf auth login`, by a token that may write there"):
        HfApi().create_repo(repository, private=private, exist_ok=True)


def upload(folder: Path, repository: str) -> str:
    """Upload a whole export in one commit; returns where it is.

    Raises:
        ValueError: in one line, if that fails; the folder stays as it is.
    """
    cure = f"{folder} is whole, repeat with `hf upload {repository} {folder} --exclude '{LEFT_OUT}'`"
    with told(f"the upload to {repository} failed", cure):
        commit = HfApi().upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export", ignore_patterns=[LEFT_OUT]
        )
    return str(commit.repo_url)


@contextmanager
def told(what: str, cure: str) -> Iterator[None]:
    """Around calls of the hub: what it says, in one line."""
    try:
        yield
    except FAILURES as error:
        said = " ".join(str(error).split("\n\n")[0].split())
        raise ValueError(f"{what}: {said or type(error).__name__}; {cure}") from error
