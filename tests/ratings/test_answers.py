"""Answers are on the disk at once, whole, each rater's apart; and whose turn is what follows from them alone."""

import json
import threading

import pytest

from srpo_lightning.ratings.answers import Answer, Answers, rater_name
from srpo_lightning.ratings.plan import make_plan
from srpo_lightning.ratings.sources import read_sources
from srpo_lightning.ratings.turns import Study
from tests.ratings.made_up import GREEN, PROMPTS, RED, answer_all, study_of, write_run


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [str(write_run(folder / name, colour).path) for name, colour in (("one", RED), ("two", GREEN))]
    sources = read_sources(runs)
    return {task: make_plan(sources, task, 2, num_prompts=4) for task in ("pairs", "grades")}


def an_answer(rater: str = "ann", item: int = 0, value: str = "left") -> Answer:
    return Answer(rater, item, "better", value, 0)


def test_what_was_answered_is_read_again(tmp_path):
    answers = Answers(tmp_path)
    assert all(answers.add(an_answer(item=item)) for item in range(3))
    assert not answers.add(an_answer(item=1, value="right"))  # another window was first
    assert answers.add(an_answer("ben"))
    for found in (answers, Answers(tmp_path)):
        assert [own.item for own in found.of("ann").values()] == [0, 1, 2]
        assert found.of("ann")[1, "better"].value == "left"
        assert len(list(found)) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ann.jsonl", "ben.jsonl"]
    assert all(json.loads(line)["at"].endswith("Z") for line in (tmp_path / "ann.jsonl").read_text().splitlines())


def test_the_last_answer_is_taken_back_and_given_anew(tmp_path):
    answers = Answers(tmp_path)
    for item in range(3):
        answers.add(an_answer(item=item))
    assert answers.undo("ann") == (2, "better")
    assert answers.undo("ann") == (1, "better")
    assert answers.add(an_answer(item=1, value="right"))
    found = Answers(tmp_path)
    assert [(own.item, own.value) for own in found.of("ann").values()] == [(0, "left"), (1, "right")]
    assert found.undo("ann") == (1, "better")
    assert found.undo("ann") == (0, "better")
    assert found.undo("ann") is None
    assert found.undo("ben") is None


def test_a_line_that_a_kill_has_torn_is_passed_over_and_then_gone(tmp_path):
    Answers(tmp_path).add(an_answer())
    path = tmp_path / "ann.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    answers = Answers(tmp_path)
    assert list(answers.of("ann")) == [(0, "better")]
    answers.add(an_answer(item=1))
    assert list(Answers(tmp_path).of("ann")) == [(0, "better"), (1, "better")]


def test_an_answer_is_on_the_disk_when_it_is_taken(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append((tmp_path / "ann.jsonl").read_text()))
    Answers(tmp_path).add(an_answer())
    assert len(synced) == 1
    assert json.loads(synced[0])["value"] == "left"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"item": "x"}', "line 2 of .*ann.jsonl is no record of an answer: delete that line"),
        ('{"item": 1, "rater": "ann", "question": "better", "value": 3, "left": 0}', "line 2 of .* is no answer"),
        ('{"item": 1, "rater": "ann", "question": "better", "value": "left"}', "line 2 of .* is no answer"),
    ],
)
def test_a_damaged_line_is_refused_by_its_place(tmp_path, line, told):
    Answers(tmp_path).add(an_answer())
    with (tmp_path / "ann.jsonl").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError, match=told):
        Answers(tmp_path)


def test_many_at_once_lose_nothing(tmp_path):
    answers = Answers(tmp_path)
    raters = ["ann", "ben", "cem"]

    def work(rater: str, start: int) -> None:
        for item in range(start, 40, 2):
            answers.add(an_answer(rater, item))

    threads = [threading.Thread(target=work, args=(rater, start)) for rater in raters for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {rater: len(Answers(tmp_path).of(rater)) for rater in raters} == dict.fromkeys(raters, 40)


def test_a_rater_is_known_whatever_the_capitals(tmp_path):
    assert rater_name("  Ann  LEE ") == "ann lee"
    assert rater_name("\u738b\u82b3") == "\u738b\u82b3"
    for text in ("", "  ", "x" * 61, "a\u0000b"):
        with pytest.raises(ValueError, match="a name has 1 to 60 letters"):
            rater_name(text)
    with pytest.raises(ValueError, match="more than 255 bytes as that of a file: type a shorter one"):
        rater_name("\u738b" * 28)
    Answers(tmp_path / "long").add(an_answer(rater_name("\u738b" * 27)))
    answers = Answers(tmp_path / "answers")
    answers.add(an_answer(rater_name("../../Eve/<b>")))
    assert [path.name for path in (tmp_path / "answers").iterdir()] == ["..%2F..%2Feve%2F%3Cb%3E.jsonl"]
    assert list(Answers(tmp_path / "answers").of("../../eve/<b>")) == [(0, "better")]


def test_a_rater_goes_through_all_and_on_after_a_break(plans, tmp_path):
    study = study_of(plans["grades"], tmp_path)
    asked = []
    for number in range(24):
        turn = study.turn("ann")
        assert (turn.number, turn.done, turn.left) == (number, number, 24 - number)
        asked.append((turn.item, turn.question))
        assert study.answer("ann", turn.number, "good")
        assert not study.answer("ann", turn.number, "fail")  # a second press
        if number % 5 == 0:
            study = study_of(plans["grades"], tmp_path)
    assert study.turn("ann") is None
    assert len(set(asked)) == 24
    assert [question for _, question in asked[:3]] == ["realism", "aesthetics", "prompt"]
    study.answers.undo("ann")
    assert (study.turn("ann").item, study.turn("ann").question) == asked[-1]


def test_what_is_no_answer_to_what_is_asked_is_not_taken(plans, tmp_path):
    study = study_of(plans["pairs"], tmp_path)
    assert not study.answer("ann", 99, "left")
    assert not study.answer("ann", -1, "left")
    assert not study.answer("ann", 0, "excellent")
    assert list(study.answers) == []


def test_two_raters_do_not_disturb_each_other_and_a_third_is_asked_only_what_is_missing(plans, tmp_path):
    study = study_of(plans["pairs"], tmp_path)
    assert study.missing() == 8
    with pytest.raises(ValueError, match=r"^8 of 8 planned answers are missing: results are shown when all are there"):
        study.check_complete()
    before = study.turn("ben")
    answer_all(study, "ann", better=0)
    assert study.turn("ben") == before
    assert study.missing() == 4
    study.answer("ben", before.number, "left")
    assert study.turn("cem").left == 3  # ann and ben have answered one
    for _ in range(2):
        turn = study.turn("cem")
        study.answer("cem", turn.number, "right")
    assert study.missing() == 1
    with pytest.raises(ValueError, match=r"^1 of 8 planned answers are missing"):
        study.check_complete()
    answer_all(study, "ben", better=1)
    study.check_complete()
    assert study.turn("cem") is None


def test_what_was_begun_may_be_finished_though_others_were_enough(plans, tmp_path):
    study = study_of(plans["grades"], tmp_path)
    study.answer("cem", study.turn("cem").number, "fail")
    for rater in ("ann", "ben"):
        answer_all(study, rater, better=0)
    assert study.turn("cem").left == 2
    assert study.turn("dora") is None


def test_answers_of_another_plan_are_refused(plans, tmp_path):
    answer_all(study_of(plans["grades"], tmp_path), "ann", better=0)
    with pytest.raises(ValueError, match=r"ann.jsonl answers what the plan does not ask: take it away"):
        Study(plans["pairs"], Answers(tmp_path / "answers"))
    assert len(PROMPTS) > 4
