"""`rate`: a page on which people judge pictures blind, and what their answers say."""

import socket
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout
from jsonargparse.typing import PositiveInt

from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.strict_json import strict_json
from srpo_lightning.ratings.answers import Answers
from srpo_lightning.ratings.plan import Task, make_plan, settle
from srpo_lightning.ratings.sources import Source, read_sources
from srpo_lightning.ratings.turns import Study

LAST_PORT = 65535


def rate(
    runs: list[str],
    task: Task = "pairs",
    output: str = "ratings",
    num_raters: PositiveInt = 3,
    num_prompts: PositiveInt | None = None,
    seed: int = 0,
    host: str = "127.0.0.1",
    port: PositiveInt = 7860,
    results: bool = False,
) -> None:
    """Show pictures of several runs or checkpoints blind to people, and count what they prefer.

    Args:
        runs: Folders of two or more runs, of which the newest pictures are taken, or folders of pictures in runs, such
            as RUN/samples/step-00000020/ema.
        task: Kind of question: `pairs` shows two pictures of a prompt and asks which is better, `grades` shows one and
            asks for the paper's four grades of realism, aesthetics and prompt.
        output: Folder of the plan, the answers and the results; the same folder goes on with a study.
        num_raters: Number of raters that answer each item.
        num_prompts: Number of prompts, of which a random choice is shown; null shows all that every run has drawn.
        seed: Number from which the chosen prompts, the order and the sides follow.
        host: Address that the page listens on; 0.0.0.0 lets in whoever reaches this machine.
        port: Port that the page listens on.
        results: Whether to print and write results in the place of opening the page.

    Raises:
        ValueError: naming the cure, if the pictures do not fit, the plan is another than the one that was settled, or
            results are asked for before the planned number of answers is there.
    """
    check_extra()
    sources = read_sources(runs)
    plan = make_plan(sources, task, num_raters, seed, num_prompts)
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is {output}, a file: name a folder")
    settle(folder / "plan.json", plan)
    if results:
        write_results(folder, Study(plan, Answers(folder / "answers")), sources)
        return
    try:
        alone = FileLock(folder / "rate.lock").acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another process shows the pages of {folder}: open its address, or end it") from error
    with alone:
        study = Study(plan, Answers(folder / "answers"))  # read under the lock: nobody adds any meanwhile
        show(study, sources, host, port)
        told = f"; {study.missing()} are missing" if study.missing() else ": `--results true` shows the results"
        print(f"{plan.num_answers} answers are planned{told}")


def check_extra() -> None:
    """Refuse early what could not be shown.

    Raises:
        ValueError: with the command that installs the missing package.
    """
    for package in ("gradio", "krippendorff"):
        if find_spec(package) is None:
            raise ValueError(f"rate needs {package}: pip install 'srpo-lightning[rate]'")


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        ValueError: naming it.
    """
    try:
        if port > LAST_PORT:
            raise OSError(f"ports end at {LAST_PORT}")
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ValueError(f"host {host}, port {port} cannot be listened on ({error}): choose another --port") from error


def show(study: Study, sources: Sequence[Source], host: str, port: int) -> None:
    """Let people answer until the process is asked to end.

    Raises:
        ValueError: if the address cannot be listened on.
    """
    check_address(host, port)
    from srpo_lightning.jobs.rate.page import open_page  # gradio takes seconds, which results need not wait for

    paths = {
        (number, picture.sample): picture.path
        for number, own in enumerate(sources)
        for picture in own.pictures.values()
    }
    plan = study.plan
    print(f"{len(plan.items)} items for {plan.num_raters} raters, {study.missing()} answers missing", flush=True)
    open_page(study, paths, host, port)


def write_results(folder: Path, study: Study, sources: Sequence[Source]) -> None:
    """Print the results of a study that is complete, and write results.md and results.json into its folder.

    Raises:
        ValueError: telling how many answers are missing.
    """
    study.check_complete()
    from srpo_lightning.ratings.results import judged  # krippendorff, an extra
    from srpo_lightning.ratings.tables import Results, as_json, text
    from srpo_lightning.ratings.trust import logged_scores, trust

    answers = list(study.answers)
    scores = logged_scores(study.plan, sources)
    found = Results(
        study.plan,
        Counter(own.rater for own in answers),
        judged(study.plan, answers),
        trust(study.plan, answers, scores),
        scores.left_out,
    )
    for name, content in (("results.md", text(found)), ("results.json", strict_json(as_json(found), 1) + "\n")):
        with complete_or_absent(folder / name) as partial:
            partial.write_text(content, encoding="utf-8")
    print(text(found))
