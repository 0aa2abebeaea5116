"""Foreign text in Markdown: what two renderers make of it is the text itself."""

import html
import re

import pytest

from srpo_lightning.callbacks.report import markdown as report
from srpo_lightning.evaluation.comparison import BASE, Measure, markdown
from srpo_lightning.evaluation.metrics import Interval
from srpo_lightning.files.markdown import Markdown, code, escaped, markdown_table

FOREIGN = [
    "<script>alert(1)</script>",
    "cat\n\n# a heading",
    "cat | dog",
    "cat\u2028| dog \x85| x",
    "[a](javascript:b) ![c](d)",
    "*a* **b** __c__ _d_ `e` ~~f~~ $g$",
    "back\\slash \\| &lt;b&gt;",
    "right\u202eleft\x07",
]


def on_one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@pytest.mark.parametrize("text", FOREIGN)
def test_foreign_text_stays_in_its_line_and_nothing_in_it_is_active(text):
    found = escaped(text)
    assert len(found.splitlines()) == 1
    assert found.isprintable()
    left = re.sub(r"\\[!-/:-@\[-`{-~]|&(amp|lt|gt);", "", found)
    assert not set(left) & set("<>&|`*[]\\~$#")
    assert "__" not in left
    assert html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", found)) == on_one_line(text)


@pytest.mark.parametrize("text", FOREIGN)
def test_a_renderer_shows_foreign_text_in_its_cell(text):
    """By markdown-it, where it is installed (with jupyter): GitHub's tables."""
    renderer = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = renderer.parse(markdown_table(["", "x"], [[text, "y"]]))
    inline = [token for token in tokens if token.type == "inline"]
    assert {child.type for token in inline for child in token.children} == {"text"}
    cells = ["".join(child.content for child in token.children) for token in inline]
    assert cells == ["", "x", on_one_line(text), "y"]


def test_names_of_measures_and_numbers_stay_legible():
    for text in ("prompt_diversity", "share/3d", "0.447 +- 0.010", "65% (60% to 70%)", "step-00000007.ckpt"):
        assert escaped(text) == text
    assert escaped(Markdown("**best**")) == "**best**"
    assert code("a_b*c") == "`a_b*c`"
    assert code("a`b") == "a\\`b"
    assert code("a|b\n# c") == "a\\|b \\# c"


def test_tags_labels_and_columns_of_a_report_are_foreign():
    measure = Measure(Interval(0.5, 0.4, 0.6), 0.1, [], None)
    text = markdown("<b>|\n# x", {BASE: {"share/<i>|": measure}, "policy": {"share/<i>|": measure}})
    assert text.splitlines()[0] == "### &lt;b&gt;\\| \\# x"
    assert "| share/&lt;i&gt;\\| | 0.5 +- 0.1 |" in text
    assert "<" not in report({"base": {"step": 0, "weights": "policy", "share/<i>|": 0.1}})
