"""Comments of configuration files: which setting each is about, and the same settings written with them again."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import yaml

Place: TypeAlias = tuple[str | int, ...]
"""A setting by the keys that lead to it; places of lists by their number."""

COLUMN = 47
"""Where comments begin, unless a line is longer."""

COMMENT = re.compile(r"\s+#\s*(.*)$")


class Plain(yaml.SafeDumper):
    """Groups as blocks, lists of values on one line."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        """Members of a list stand further in than its name."""
        return super().increase_indent(flow, False)


def _listed(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    is_plain = not any(isinstance(value, dict | list) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=is_plain)


Plain.add_representer(list, _listed)


def comments_of(text: str) -> dict[Place, str]:
    """The comments that stand behind settings, by the setting.

    Args:
        text: Content of a configuration file.
    """
    lines = text.splitlines()
    found = {}
    for place, (line, column) in _ends(text):
        if behind := COMMENT.match(lines[line][column:]):
            found[place] = behind[1]
    return found


def commented(settings: Mapping[str, Any], comments: Mapping[Place, str]) -> str:
    """Settings as the text of a configuration file, with the comments behind those that they are about."""
    text = yaml.dump(dict(settings), Dumper=Plain, sort_keys=False, width=1 << 16, allow_unicode=True)
    lines = text.splitlines()
    for place, (line, _) in _ends(text):
        if place in comments:
            lines[line] = f"{lines[line]:<{COLUMN}}  # {comments[place]}"
    return "\n".join(lines) + "\n"


def _ends(text: str) -> Iterator[tuple[Place, tuple[int, int]]]:
    """Every setting, with the line and the column behind it: of a group those of its name."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        yield from _ends_in((), root)


def _ends_in(place: Place, node: yaml.Node) -> Iterator[tuple[Place, tuple[int, int]]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            own = (*place, key.value)
            is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
            yield own, _end(key, 1) if is_block else _end(value)
            if is_block:
                yield from _ends_in(own, value)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _ends_in((*place, number), value)


def _end(node: yaml.Node, beyond: int = 0) -> tuple[int, int]:
    return node.end_mark.line, node.end_mark.column + beyond
