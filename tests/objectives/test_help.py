"""Help texts, as the command line shows them."""

import pytest
from jsonargparse import ArgumentParser

from srpo_lightning import objectives, rewards
from tests.cli.test_flags import FLAGS

HOUSES = (objectives.__name__, rewards.__name__)
COMPONENTS = [component for component in FLAGS if component.__module__.startswith(HOUSES)]
NOT_A_NOUN = {"The", "A", "An", "Of", "How", "What", "Where", "As", "None", "Null", "These", "Each", "All"}


def texts(component) -> dict[str, str]:
    parser = ArgumentParser()
    parser.add_class_arguments(component, as_group=False, sub_configs=True)
    return {action.dest: str(action.help).strip() for action in parser._actions if "help" not in action.dest}


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.__name__)
def test_every_setting_has_a_help_text_that_begins_with_its_noun(component):
    for setting, text in texts(component).items():
        assert text[:1].isupper(), f"{setting}: {text}"
        assert text.split()[0] not in NOT_A_NOUN, f"{setting}: {text}"


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.__name__)
def test_a_help_text_needs_no_other(component):
    for setting, text in texts(component).items():
        assert "the same." not in text, f"{setting}: {text}"
        assert not {"above.", "below.", "likewise.", "likewise"} & set(text.split()), f"{setting}: {text}"
