"""Both pages as a browser shows them, from a folder with markup in its prompts."""

import html
import json
import re
from pathlib import Path

import pytest

from srpo_lightning.evaluation.meanings import meaning
from srpo_lightning.report import samples
from srpo_lightning.report.comparison_page import write_comparison_page
from srpo_lightning.report.run_page import RunPage
from tests.browser import needs_browser, visit
from tests.notebooks import colours
from tests.report.made_up import MARKUP, write_run
from tests.report.test_run_page import Elements

pytestmark = needs_browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> tuple[Path, Path]:
    """The page of a run, and that of two."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / name, shift) for name, shift in (("one", 0.01), ("two", 0.03))]
    write_comparison_page(folder / "both.html", [run.path for run in runs])
    return RunPage(runs[0]).write(), folder / "both.html"


def test_the_page_of_a_run_is_drawn(pages, tmp_path):
    dom, picture = visit(pages[0].as_uri(), tmp_path, height=2400)
    assert "<title>one: report</title>" in dom  # no prompt's script has run
    assert "Step 20: 4 samples won, 3 lost, 1 alike." in dom
    assert dom.count("<article") == 3 + 5  # prompts and charts
    elements = Elements()
    elements.feed(dom)
    assert {"img", "svg"} < {tag for tag, _ in elements.found}
    assert not any("onerror" in attributes for _, attributes in elements.found)
    assert any(attributes.get("title") == MARKUP for _, attributes in elements.found)
    drawn_last = (200, 0, 80)  # by the policy, of the second prompt
    assert any(all(abs(a - b) < 8 for a, b in zip(colour, drawn_last, strict=True)) for colour in colours(picture))


def test_the_page_of_two_runs_is_drawn(pages, tmp_path):
    dom, _ = visit(pages[1].as_uri(), tmp_path, height=2400)
    assert "<title>Runs compared</title>" in dom
    assert dom.count("<article") == 5 + 3
    assert "+0.020" in dom  # the judge's difference


def test_a_run_may_be_called_base(pages, tmp_path):
    level = "stroke: var(--base)"
    assert level in visit(pages[0].as_uri(), tmp_path)[0]
    runs = [write_run(tmp_path / name, shift) for name, shift in (("base", 0.01), ("two", 0.03))]
    write_comparison_page(tmp_path / "both.html", [run.path for run in runs])
    assert level not in visit((tmp_path / "both.html").as_uri(), tmp_path)[0]


ACTIONS = """
const found = {};
const one = (selector) => document.querySelector(selector);
const slider = one("#step");
slider.value = 0;
slider.dispatchEvent(new Event("input"));
found.step = one("output").textContent;
found.alternative = one(".card figure:nth-child(2) img").alt;
found.differs = one(".card figure:nth-child(2) img").src !== one(".card figure:nth-child(1) img").src;
one(".card figure button").click();
found.large = one("dialog").open && one("dialog").querySelectorAll("img").length;
one("dialog").close();
const first = () => one("#samples tbody tr td:nth-child(6)").textContent;
found.worst = first();
[...document.querySelectorAll("#samples th button")].at(-1).click();
found.best = first();
const drawing = one(".chart > svg");
drawing.dispatchEvent(new KeyboardEvent("keydown", {key: "Home"}));
found.read = one(".chart .readout").textContent;
one(".term").dispatchEvent(new Event("focus"));
found.meaning = one("#tip").hidden ? "" : one("#tip").textContent;
document.title = JSON.stringify(found);
"""


def test_the_page_answers_to_its_user(pages, tmp_path):
    text = re.sub("<meta http-equiv[^>]*>", "", pages[0].read_text())
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{ACTIONS}</script></body>"))
    dom, _ = visit((tmp_path / "page.html").as_uri(), tmp_path)
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom)[1]))
    assert (found["step"], found["alternative"]) == ("step 10", "a red apple, policy after 10 steps")
    assert found["differs"]
    assert found["large"] == 3
    assert (found["worst"], found["best"]) == ("\u22120.060", "+0.080")  # .02 x (i - 3), for i from 0 to 7
    assert found["read"] == "step 0base 0.250policy 0.250ema -"
    assert found["meaning"] == meaning("held_out")


def test_counts_are_over_all_samples_also_those_that_are_not_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MAX_SAMPLES", 4)
    dom, _ = visit(RunPage(write_run(tmp_path / "run")).write().as_uri(), tmp_path)
    listed = "Of 8 samples the worst and the best 2 by held_out of policy are listed."
    assert f"Step 20: 4 samples won, 3 lost, 1 alike. {listed}" in dom


@pytest.mark.parametrize("page", [0, 1])
def test_nothing_is_wider_than_a_phone(pages, tmp_path, page):
    """A copy of the page, in a frame of 390 pixels, tells how wide its content is."""
    tells = "<script>onload = () => parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    text = re.sub("<meta http-equiv[^>]*>", "", pages[page].read_text())
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{tells}</body>"))
    frame = tmp_path / "phone.html"
    frame.write_text(
        "<script>onmessage = (event) => document.title = event.data</script>"
        '<iframe src="page.html" width=390 height=2000 frameborder=0></iframe>'
    )
    dom, _ = visit(frame.as_uri(), tmp_path, width=800, height=2000)
    assert "<title>390</title>" in dom
