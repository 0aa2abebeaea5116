"""What studies say whose raters are made up, from the answers to the text that a user reads."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from srpo_lightning.cli import main
from srpo_lightning.ratings.plan import make_plan
from srpo_lightning.ratings.results import judged
from srpo_lightning.ratings.sources import read_sources
from srpo_lightning.ratings.trust import logged_scores, trust
from tests.ratings.made_up import BLUE, GREEN, PROMPTS, RED, answer_all, study_of, write_run
from tests.refusals import refused
from tests.report.made_up import CLIP, MARKUP

COUNT = len(PROMPTS)


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """Two runs, of which the second has the better pictures by the score `good`."""
    made = (("one", RED, 0.0), ("two", GREEN, 0.5))
    return [str(write_run(tmp_path / name, colour, quality=quality).path) for name, colour, quality in made]


def study(runs, tmp_path, task, raters=("ann", "ben"), **settings):
    sources = read_sources(runs)
    made = study_of(make_plan(sources, task, len(raters), **settings), tmp_path / f"of {task}")
    for number, rater in enumerate(raters):
        answer_all(made, rater, better=1, but=number)
    return made, sources


@pytest.mark.parametrize("task", ["pairs", "grades"])
def test_what_raters_prefer_wins_on_whichever_side_it_was(runs, tmp_path, task):
    """Ann always prefers the second run, Ben with one exception: of 28 comparisons the first wins one."""
    made, _ = study(runs, tmp_path, task)
    for found in judged(made.plan, made.answers).values():
        (win,) = found.wins
        assert (win.first, win.second, win.comparisons, win.ties) == ("one policy 20", "two policy 20", 2 * COUNT, 0)
        assert win.rate.value == pytest.approx(1 / (2 * COUNT))
        assert win.rate.low < win.rate.value < win.rate.high < 0.3
        expected = math.log((2 * COUNT - 0.5) / 1.5) / 2
        assert found.strengths["two policy 20"].value == pytest.approx(expected, abs=1e-6)
        assert found.strengths["two policy 20"].low > 0 > found.strengths["one policy 20"].high
        assert found.alpha.value == pytest.approx(0.86, abs=0.03)  # 13 of 14 agree, and 1 of 2 would by chance


def test_grades_are_shared_out_by_source(runs, tmp_path):
    made, _ = study(runs, tmp_path, "grades")
    found = judged(made.plan, made.answers)
    assert list(found) == ["realism", "aesthetics", "prompt"]
    shares = found["prompt"].shares
    assert {grade: own.value for grade, own in shares["two policy 20"].items()} == pytest.approx(
        {"excellent": 0, "good": 1 - 1 / (2 * COUNT), "pass": 1 / (2 * COUNT), "fail": 0}
    )
    assert shares["one policy 20"]["good"].value == pytest.approx(1 / (2 * COUNT))
    assert shares["one policy 20"]["excellent"].high > 0.1  # none of 14 prompts proves no share of zero


def test_ties_count_half(runs, tmp_path):
    made = study_of(make_plan(read_sources(runs), "pairs", 1), tmp_path)
    while turn := made.turn("ann"):
        made.answer("ann", turn.number, "equal")
    found = judged(made.plan, made.answers)["better"]
    assert (found.wins[0].rate.value, found.wins[0].ties) == (0.5, 1)
    assert found.strengths["one policy 20"].value == pytest.approx(0, abs=1e-9)
    assert math.isnan(found.alpha.value)  # of one rater


def test_equal_means_the_same_on_both_sides_for_agreement(runs, tmp_path):
    """Raters who see a pair turned round and agree on the picture agree, though they press other keys."""
    made, _ = study(runs, tmp_path, "pairs", raters=("ann", "cem"))
    values = {(own.item, own.value) for own in made.answers}
    assert len(values) > COUNT  # other keys
    assert judged(made.plan, made.answers)["better"].alpha.value > 0.5


@pytest.mark.parametrize("task", ["pairs", "grades"])
def test_a_score_that_goes_with_people_is_told_from_one_that_goes_against_them(runs, tmp_path, task):
    made, sources = study(runs, tmp_path, task)
    scores = logged_scores(made.plan, sources)
    assert set(scores.by_name) == {"good", "bad"}  # brightness is no reward, and what is no number no score
    assert scores.left_out == {"half": f"{COUNT} of {2 * COUNT} pictures have none"}
    for found in trust(made.plan, list(made.answers), scores).values():
        assert found["good"].accuracy.value == pytest.approx(1 - 1 / (2 * COUNT))
        assert found["bad"].accuracy.value == pytest.approx(1 / (2 * COUNT))
        assert found["good"].accuracy.low > 0.7
        assert found["good"].preferences == 2 * COUNT
        assert found["good"].correlation.value == pytest.approx(-found["bad"].correlation.value)
        assert found["good"].correlation.value > 0


def test_a_correlation_of_pairs_does_not_depend_on_which_run_is_named_first(runs, tmp_path):
    there, sources = study(runs, tmp_path, "pairs")
    back = study_of(make_plan(read_sources(runs[::-1]), "pairs", 2), tmp_path / "back")
    for number, rater in enumerate(("ann", "ben")):
        answer_all(back, rater, better=0, but=number)
    one = trust(there.plan, list(there.answers), logged_scores(there.plan, sources))["better"]["good"]
    other = trust(back.plan, list(back.answers), logged_scores(back.plan, sources[::-1]))["better"]["good"]
    assert one.correlation.value == pytest.approx(other.correlation.value)
    assert one.accuracy == pytest.approx(other.accuracy)
    assert one.correlation.value > 0.8


def test_scores_of_another_measure_are_not_compared(runs, tmp_path):
    config = Path(runs[1]) / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    tracking = settings["trainer"]["callbacks"][0]["init_args"]
    tracking["metrics"] = {"good": {"class_path": CLIP, "init_args": {"pretrained": "another"}}}
    config.write_text(yaml.safe_dump(settings))
    made, sources = study(runs, tmp_path, "pairs")
    scores = logged_scores(made.plan, sources)
    assert scores.left_out["good"] == "runs measure it by other rewards, judges or forms"
    assert "good" not in scores.by_name


def test_three_sources_have_three_win_rates_and_strengths_in_order(runs, tmp_path):
    three = str(write_run(tmp_path / "three", BLUE).path)
    made, _ = study([*runs, three], tmp_path, "grades", num_prompts=6)
    found = judged(made.plan, made.answers)["realism"]
    assert [(win.first[:3], win.second[:3]) for win in found.wins] == [("one", "two"), ("one", "thr"), ("two", "thr")]
    assert found.wins[1].ties > 0.9  # both are graded `pass`
    assert max(found.strengths, key=lambda name: found.strengths[name].value) == "two policy 20"


@pytest.mark.parametrize("task", ["pairs", "grades"])
def test_results_are_shown_when_all_answers_are_there(runs, tmp_path, task, capsys):
    output = tmp_path / "study"
    words = ["rate", *runs, "--task", task, "--output", str(output), "--num_raters", "2", "--results", "true"]
    total = 2 * COUNT if task == "pairs" else 2 * 2 * COUNT * 3
    refused(words, f"{total} of {total} planned answers are missing", capsys)
    assert not (output / "results.json").exists()
    made = study_of(make_plan(read_sources(runs), task, 2), output)
    answer_all(made, "ann", better=1)
    refused(words, f"{total // 2} of {total} planned answers are missing", capsys)
    answer_all(made, "ben | <b>", better=1, but=1)
    main(words)
    text = capsys.readouterr().out
    assert text.strip() == (output / "results.md").read_text().strip()
    assert f"What 2 raters say of {COUNT} prompts" in text
    assert re.search(r"\| one policy 20 \| two policy 20 \| 4% \(\d+% to \d+%\) \| 0% \| 28 \|", text)
    assert re.search(r"\| good \| 96% \(\d+% to 99%\) \| \+0\.\d\d \([+-]0\.\d\d to \+[01]\.\d\d\) \| 28 \|", text)
    assert text.index("| good |") < text.index("| bad |")  # the most trusted first
    assert "`half` is not compared: 14 of 28 pictures have none." in text
    content = json.loads((output / "results.json").read_text())
    question = content["questions"]["better" if task == "pairs" else "realism"]
    assert content["answers"] == {"ann": total // 2, "ben | <b>": total // 2}
    assert question["wins"][0]["rate"]["value"] == pytest.approx(1 / (2 * COUNT))
    assert question["rewards"]["good"]["accuracy"]["high"] <= 1
    assert MARKUP not in text


def test_few_prompts_are_said_to_be_few(runs, tmp_path, capsys):
    output = tmp_path / "study"
    answer_all(study_of(make_plan(read_sources(runs), "pairs", 1, num_prompts=3), output), "ann", better=1)
    main(["rate", *runs, "--output", str(output), "--num_raters", "1", "--num_prompts", "3", "--results", "true"])
    text = capsys.readouterr().out
    assert "Intervals over 3 prompts are too narrow: show 12 or more." in text
    assert "by Krippendorff's alpha unknown." in text


def test_the_command_refuses_in_one_line(runs, tmp_path, capsys, monkeypatch):
    output = tmp_path / "study"
    words = ["rate", *runs, "--output", str(output)]
    refused([*words[:2], "--output", str(output)], "rate has 1 run: name two or more", capsys)
    refused([*words, "--task", "grade"], "task", capsys)
    refused([*words, "--port", "99999"], "port 99999 cannot be listened on .*: choose another --port", capsys)
    refused([*words, "--seed", "1", "--results", "true"], "seed is 0 there and 1 here", capsys)
    with FileLock(output / "rate.lock"):
        refused(words, "another process shows the pages of .*study: open its address, or end it", capsys)
    (tmp_path / "file").write_text("")
    refused([*words[:-1], str(tmp_path / "file")], "output is .*, a file: name a folder", capsys)
    for package in ("gradio", "krippendorff"):
        monkeypatch.setattr(
            "srpo_lightning.jobs.rate.job.find_spec", lambda name, absent=package: None if name == absent else name
        )
        refused(words, rf"rate needs {package}: pip install 'srpo-lightning\[rate\]'", capsys)
