"""Questions on a terminal; each is asked again until its answer can be used."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

Value = TypeVar("Value")


class Question(NamedTuple):
    """A question.

    Args:
        text: Question as it is put.
        default: Answer that Enter gives; None: there is none.
    """

    text: str
    default: str | None = None


def ask(question: Question, read: Callable[[str], Value]) -> Value:
    """Put a question until its answer can be read.

    Args:
        question: Question to put.
        read: Reader of an answer; it raises ValueError, in words, for one that cannot be used.

    Raises:
        ValueError: if there is no terminal any more.
    """
    shown = f"{question.text} [{question.default}]: " if question.default is not None else f"{question.text}: "
    while True:
        try:
            print(shown, end="", flush=True)  # `input` itself would put it on stderr
            answer = input().strip() or question.default
        except EOFError as error:
            raise ValueError("the questions have no answer: give options, `init --help` lists them") from error
        if answer is None:
            continue
        try:
            return read(answer)
        except ValueError as error:
            print(f"  {error}")
