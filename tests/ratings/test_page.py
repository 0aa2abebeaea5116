"""A study in a browser: several raters with keyboards and phones, who come back, while the page is killed."""

import base64
import io
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from srpo_lightning.cli import main
from srpo_lightning.ratings.answers import Answers
from tests.browser import CHROMIUM, needs_browser
from tests.processes import LIMIT_S, launch
from tests.ratings.made_up import GREEN, PROMPTS, RED, write_run
from tests.report.made_up import MARKUP

pytestmark = needs_browser

NAMES = ("secret-one", "secret-two")
FEW = PROMPTS[-5:]
PATIENCE_MS = LIMIT_S * 1000


class Study:
    """A study whose page is served by a process of its own.

    Args:
        folder: Folder for the runs, the study and what the process prints.
        task: Kind of question.
        settings: Further words of the command line.
    """

    def __init__(self, folder: Path, task: str, *settings: str) -> None:
        self.folder = folder
        runs = zip(NAMES, (RED, GREEN), (0.0, 0.5), strict=True)
        paths = [str(write_run(folder / name, colour, FEW, quality).path) for name, colour, quality in runs]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.output = folder / "study"
        self.words = ["rate", *paths, "--task", task, "--output", str(self.output), *settings]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.log = folder / "log"
        self.serve()

    def serve(self) -> None:
        """Start the process, and wait until it has told the address."""
        before = self.log.read_text().count("open http") if self.log.exists() else 0
        self.process = launch([*self.words, "--port", str(self.port)], self.log)
        deadline = time.monotonic() + LIMIT_S
        while self.log.read_text().count("open http") == before if self.log.exists() else True:
            assert self.process.is_alive(), self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def end(self) -> str:
        """End the process as a service manager does; return what it has printed."""
        self.process.terminate()
        self.process.join(LIMIT_S)
        assert self.process.exitcode == 0
        return self.log.read_text()

    def given(self, rater: str) -> list[str]:
        """The answers of a rater that are on the disk, in their order."""
        return [own.value for own in Answers(self.output / "answers").of(rater).values()]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def study(tmp_path) -> Iterator[Callable[..., Study]]:
    made: list[Study] = []

    def make(*words: str) -> Study:
        made.append(Study(tmp_path, *words))
        return made[-1]

    yield make
    for own in made:
        own.process.kill()
        own.process.join()


@pytest.fixture
def visitor(browser) -> Iterator[Callable[..., Page]]:
    """Somebody with a browser of their own, who may have asked for things from elsewhere."""
    contexts = []

    def arrive(url: str, name: str = "", width: int = 1280, height: int = 900) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        contexts[-1].set_default_timeout(PATIENCE_MS)
        page = contexts[-1].new_page()
        page.on("request", lambda request: hosts.add(request.url.partition("?")[0]))
        page.goto(url)
        if name:
            page.get_by_label("Your name").fill(name)
            page.keyboard.press("Enter")
            expect(page.locator(".bar")).to_contain_text("answered", timeout=PATIENCE_MS)
        return page

    hosts: set[str] = set()
    yield arrive
    for context in contexts:
        context.close()
    assert {url.split("/")[2].split(":")[0] for url in hosts if url.startswith("http")} == {"127.0.0.1"}
    assert not [url for url in hosts for name in NAMES if name in url]


def press(page: Page, key: str) -> None:
    """Press a key, and wait until the page has changed."""
    before = page.inner_text(".bar") if page.locator(".bar").count() else "end"
    page.keyboard.press(key)
    page.wait_for_function(
        "before => (document.querySelector('.bar')?.innerText ?? 'end') !== before", arg=before, timeout=PATIENCE_MS
    )


def progress(page: Page) -> str:
    return page.inner_text(".bar span:last-child")


def pictures(page: Page) -> list[Image.Image]:
    """The pictures of the page, as a browser got them."""
    urls = page.eval_on_selector_all(".pictures img", "all => all.map(one => one.src)")
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def colours(page: Page) -> list[tuple[int, ...]]:
    return [picture.getpixel((10, 10)) for picture in pictures(page)]


def judge(page: Page) -> None:
    """Prefer the green picture, wherever it is."""
    left, _ = colours(page)
    press(page, "ArrowLeft" if left == GREEN else "ArrowRight")


def finish(page: Page) -> None:
    while page.locator(".end").count() == 0:
        judge(page)
    expect(page.locator(".end")).to_have_text("Thank you, that was all.")


def test_a_study_of_pairs_from_the_first_key_to_the_results(study, visitor, capsys):
    """Ann answers by keys, Ben on another machine at the same time; the page is killed and both go on."""
    made = study("pairs", "--num_raters", "2")
    ann, ben = visitor(made.url, "Ann"), visitor(made.url, "Ben")
    assert progress(ann) == progress(ben) == f"0 of {len(FEW)} answered"
    judge(ann)
    judge(ben)
    judge(ann)
    assert (progress(ann), progress(ben)) == (f"2 of {len(FEW)} answered", f"1 of {len(FEW)} answered")
    assert (len(made.given("ann")), len(made.given("ben"))) == (2, 1)

    press(ann, "2")
    assert made.given("ann")[2] == "equal"
    shown = ann.inner_text(".prompt")
    press(ann, "Backspace")
    assert progress(ann) == f"2 of {len(FEW)} answered"
    assert len(made.given("ann")) == 2
    assert ann.inner_text(".prompt") != shown

    shown, sides = ann.inner_text(".prompt"), colours(ann)
    ann.reload()
    expect(ann.locator(".prompt")).to_have_text(shown, timeout=PATIENCE_MS)
    assert colours(ann) == sides

    judge(ann)
    made.process.kill()
    made.process.join()
    path = made.output / "answers" / "ann.jsonl"
    with path.open("a") as stream:
        stream.write('{"rater": "ann", "it')  # as if it had been writing
    made.serve()
    ann.reload()
    expect(ann.locator(".bar")).to_contain_text(f"3 of {len(FEW)} answered", timeout=PATIENCE_MS)
    finish(ann)
    later = visitor(made.url, "  BEN ")
    assert progress(later) == f"1 of {len(FEW)} answered"
    finish(later)
    assert all(json.loads(line) for line in path.read_text().splitlines())

    assert "`--results true` shows the results" in made.end()
    main([*made.words, "--results", "true"])
    text = capsys.readouterr().out
    assert re.search(r"secret-one policy 20 \| secret-two policy 20 \| 0% \(0% to \d+%\) \| 0% \| 10 \|", text)
    assert re.search(r"\| good \| 100% ", text)


def test_a_study_of_grades_on_a_phone(study, visitor):
    made = study("grades", "--num_raters", "1", "--num_prompts", "2")
    page = visitor(made.url, "Ann", width=390, height=844)
    total = 2 * 2 * 3
    assert len(pictures(page)) == 1
    shown = page.inner_text(".prompt")
    for key, question in (("4", "real and detailed"), ("1", "beautiful"), ("2", "what the text says")):
        assert question in page.inner_text(".question")
        assert page.inner_text(".prompt") == shown
        press(page, key)
    assert made.given("ann") == ["excellent", "fail", "pass"]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    press(page, "Enter")
    assert made.given("ann")[3] == "good"
    page.get_by_role("button", name="Take back").click()
    expect(page.locator(".bar")).to_contain_text(f"3 of {total} answered", timeout=PATIENCE_MS)
    page.get_by_role("button", name="Excellent").click()
    expect(page.locator(".bar")).to_contain_text(f"4 of {total} answered", timeout=PATIENCE_MS)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for selector in ("#choices button:last-child", ".pictures img", ".prompt", "#undo"):
        box: Any = page.locator(selector).bounding_box()
        assert 0 <= box["x"] <= 390 - box["width"], selector
        assert box["y"] + box["height"] <= 844, selector  # all without scrolling
    while page.locator(".end").count() == 0:
        press(page, "3")
    assert len(made.given("ann")) == total
    press(page, "u")
    assert len(made.given("ann")) == total - 1


def test_a_picture_fills_the_window_and_goes_back(study, visitor):
    made = study("pairs", "--num_raters", "1", "--num_prompts", "2")
    page = visitor(made.url, "Ann")
    small: Any = page.locator(".pictures img").first.bounding_box()
    assert 400 < small["width"] < 640  # both beside each other, as large as the window lets them
    page.locator(".pictures img").first.click()
    box: Any = page.locator(".pictures img").first.bounding_box()
    assert (box["width"], box["height"]) == (1280, 900)
    page.keyboard.press("Escape")
    page.wait_for_function("document.querySelector('img.large') === null")


def test_nothing_on_the_page_tells_whose_a_picture_is(study, visitor):
    """Neither what a browser is sent, nor files, alternative texts, names or metadata; and markup is text."""
    made = study("pairs", "--num_raters", "1")
    sent: list[str] = []
    page = visitor(made.url)
    page.on("response", lambda answer: sent.append(body(answer)))
    page.reload()
    page.get_by_label("Your name").fill("<b>Eve</b>")
    page.keyboard.press("Enter")
    expect(page.locator(".bar span").first).to_have_text("<b>eve</b>", timeout=PATIENCE_MS)
    seen, turned, alone = set(), set(), []
    for number in range(len(FEW)):
        sent.append(page.content())
        seen.add(page.locator(".prompt").evaluate("one => one.textContent"))
        turned.add(tuple(colours(page)))
        alone += [picture.info.keys() - {"interlace"} for picture in pictures(page)]
        assert page.eval_on_selector_all(".pictures img", "all => all.map(one => one.alt)") == ["left", "right"]
        assert page.locator(".prompt > *").count() == 0
        press(page, str(1 + number % 3))
    assert seen == set(FEW)  # the one with markup and placeholders among them, letter by letter
    assert page.title() == "Pictures"
    assert any(MARKUP in prompt for prompt in seen)
    assert turned == {(RED, GREEN), (GREEN, RED)}
    assert alone == [set()] * 2 * len(FEW)
    text = "".join(re.sub(r"data:image/png;base64,[\w+/=]*", "", own) for own in sent)
    assert "prompt 10" in text  # it is what the page was made of
    for told in (*NAMES, "step-", "00003.png", "policy", str(made.folder), "samples/", "metadata"):
        assert told not in text, told


def body(answer: Any) -> str:
    """The text of an answer that is data or a page, and none of the libraries'."""
    if answer.request.resource_type in ("document", "xhr", "fetch") and "/assets/" not in answer.url:
        try:
            return answer.text()
        except Exception:  # of a stream that goes on
            return ""
    return ""


def test_a_name_is_asked_for(study, visitor):
    made = study("pairs", "--num_raters", "1", "--num_prompts", "2")
    page = visitor(made.url)
    page.get_by_role("button", name="Begin").click()
    expect(page.locator(".refused")).to_have_text("a name has 1 to 60 letters: type yours", timeout=PATIENCE_MS)
    assert page.locator(".pictures").count() == 0
    page.get_by_label("Your name").fill("3 u")  # keys in a name are letters
    page.keyboard.press("Enter")
    expect(page.locator(".bar")).to_contain_text("0 of 2 answered", timeout=PATIENCE_MS)
    assert made.given("3 u") == []
