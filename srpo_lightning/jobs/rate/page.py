"""The page on which people answer: it knows pictures by their place in a rater's own order, and no names."""

import html
import io
import signal
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from srpo_lightning.ratings.answers import rater_name
from srpo_lightning.ratings.plan import CHOICES, Plan
from srpo_lightning.ratings.turns import Study, Turn
from srpo_lightning.report.thumbnails import as_uri

FOLDER = Path(__file__).parent
KEPT_PICTURES = 64
KEYS = {
    "grades": "Keys: 1 to 4 grade, arrows move, Backspace takes back",
    "pairs": "Keys: arrows left, down and right, or 1 to 3; Backspace takes back",
}
WELCOME = (
    "<h1>Which pictures are good?</h1><p>You see pictures and the text that each is to show. Judge what you see, "
    "quickly; there is no right answer. Every answer is kept at once: go away and come back under the same name.</p>"
)
REMEMBER = """(name) => {
    const url = new URL(location);
    url.searchParams.set("rater", name);
    history.replaceState({}, "", url);
}"""
"""The name goes into the page's address, so that a page that is loaded again, or bookmarked, goes on."""


def open_page(study: Study, paths: Mapping[tuple[int, int], Path], host: str, port: int) -> None:
    """Serve the page until SIGINT or SIGTERM.

    Args:
        study: What is asked, and what was answered.
        paths: Files of the pictures by source and evaluation sample.
        host: Address to listen on.
        port: Port to listen on.
    """
    page = make_page(study, paths)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,  # whatever the environment says: nothing leaves this machine
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # others are fetched
        css=(FOLDER / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(FOLDER / 'page.js').read_text(encoding='utf-8')}</script>",
    )
    print(f"open http://{host}:{port} - Ctrl-C ends the page, and the same command goes on", flush=True)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    page.close(verbose=False)


def make_page(study: Study, paths: Mapping[tuple[int, int], Path]) -> gr.Blocks:
    """The page, not yet served."""
    plan = study.plan
    with gr.Blocks(title="Pictures", analytics_enabled=False) as page:
        with gr.Column(elem_id="start") as start:
            told = gr.HTML(WELCOME)
            name = gr.Textbox(label="Your name", max_lines=1, elem_id="name")
            begin = gr.Button("Begin", variant="primary", elem_id="begin")
        with gr.Column(visible=False) as shown:
            sheet = gr.HTML()
            with gr.Row(elem_id="choices") as choices:
                buttons = [gr.Button(f"{i} {own.capitalize()}") for i, own in enumerate(CHOICES[plan.task], 1)]
            undo = gr.Button("Take back", size="sm", elem_id="undo")
        number = gr.Number(visible=False, precision=0)  # in the browser, so that it outlives this process
        outputs: list[Any] = [start, told, shown, sheet, choices, undo, number]

        def look(text: str) -> list[Any]:
            return view(study, paths, text)

        def take_back(text: str) -> list[Any]:
            study.answers.undo(rater_name(text))
            return view(study, paths, text)

        def returning(request: gr.Request) -> list[Any]:
            text = str(request.query_params.get("rater") or "")
            if not text:  # somebody may be typing a name already
                return [gr.skip()] * (1 + len(outputs))
            return [text, *view(study, paths, text)]

        for event in (begin.click, name.submit):
            event(look, name, outputs, api_visibility="private").success(None, name, None, js=REMEMBER)
        for button, value in zip(buttons, CHOICES[plan.task], strict=True):
            button.click(answering(study, paths, value), [name, number], outputs, api_visibility="private")
        undo.click(take_back, name, outputs, api_visibility="private")
        page.load(returning, None, [name, *outputs], api_visibility="private")
    return page


def answering(study: Study, paths: Mapping[tuple[int, int], Path], value: str) -> Any:
    """What a button does."""

    def answer(text: str, number: int | None) -> list[Any]:
        if number is not None:
            study.answer(rater_name(text), number, value)
        return view(study, paths, text)

    return answer


def view(study: Study, paths: Mapping[tuple[int, int], Path], text: str) -> list[Any]:
    """What a rater sees: start, told, shown, sheet, choices, undo, number."""
    try:
        rater = rater_name(text)
    except ValueError as error:
        told = f"{WELCOME}<p class=refused>{html.escape(str(error))}</p>"
        return [gr.Column(visible=True), told, gr.Column(visible=False), "", gr.skip(), gr.skip(), None]
    turn = study.turn(rater)
    has_answered = bool(study.answers.of(rater))
    sheet = "<p class=end>Thank you, that was all.</p>" if turn is None else sheet_of(study.plan, turn, rater, paths)
    return [
        gr.Column(visible=False),
        WELCOME,
        gr.Column(visible=True),
        sheet,
        gr.Row(visible=turn is not None),
        gr.Button(interactive=has_answered),
        None if turn is None else turn.number,
    ]


def sheet_of(plan: Plan, turn: Turn, rater: str, paths: Mapping[tuple[int, int], Path]) -> str:
    """A prompt, its pictures and the question, as HTML in which no foreign text is markup."""
    sides = ("left", "right") if len(turn.pictures) > 1 else ("the picture",)
    figures = "".join(
        f'<figure><img src="{data_uri(paths[own.source, own.sample])}" alt="{side}"></figure>'
        for own, side in zip(turn.pictures, sides, strict=True)
    )
    names = list(plan.questions)
    step = f" <span class=step>{names.index(turn.question) + 1} of {len(names)}</span>" if len(names) > 1 else ""
    total = turn.done + turn.left
    return (
        f"<div class=bar><span>{html.escape(rater)}</span><span>{turn.done} of {total} answered</span></div>"
        f"<p class=prompt dir=auto>{html.escape(plan.items[turn.item].prompt)}</p>"
        f'<div class="pictures{" one" if len(sides) == 1 else ""}">{figures}</div>'
        f"<p class=question>{html.escape(plan.questions[turn.question])}{step}</p><p class=keys>{KEYS[plan.task]}</p>"
    )


@lru_cache(maxsize=KEPT_PICTURES)
def data_uri(path: Path) -> str:
    """The pixels of a picture alone: its file's name, times and texts stay here."""
    with Image.open(path) as picture:
        pixels = picture.convert("RGB")
        alone = Image.frombytes("RGB", pixels.size, pixels.tobytes())
    stream = io.BytesIO()
    alone.save(stream, "PNG", compress_level=1)
    return as_uri("png", stream.getvalue())
