"""How the command line says no."""

import re

import pytest

from srpo_lightning.cli import main


def refused(arguments: list[str], cure: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which the command line ends, which is one line and names the cure (a pattern)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    message = str(ended.value.code)
    assert message.startswith("error: "), message
    assert "\n" not in message, message
    assert re.search(cure, message), message
    return message
