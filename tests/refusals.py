"""How the command line says no."""

import re

import pytest

from srpo_lightning.cli import main


def refused(arguments: list[str], cure: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which the command line ends, which is one line and names the cure (a pattern).

    What a parser refuses has status 2 and a line before it that says where help is; what the package refuses, status 1.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    if ended.value.code == 2:
        usage, _, message = capsys.readouterr().err.rstrip("\n").partition("\n")
        assert usage.startswith("usage: "), usage
    else:
        message = str(ended.value.code)
        assert message.startswith("error: "), message
    assert re.search(cure, message), message
    return message
