"""Whose pictures are shown, in which order, and a plan that cannot change once it is settled."""

import json
import re
from collections import Counter

import pytest

from srpo_lightning.ratings.plan import make_plan, settle
from srpo_lightning.ratings.sources import read_sources
from tests.ratings.made_up import BLUE, GREEN, PROMPTS, RED, add_picture, write_run


@pytest.fixture
def runs(tmp_path) -> list[str]:
    return [str(write_run(tmp_path / name, colour).path) for name, colour in (("one", RED), ("two", GREEN))]


def test_a_run_is_its_newest_step_and_a_folder_of_pictures_is_what_it_says(runs, tmp_path):
    run = write_run(tmp_path / "one", RED, step=0)
    add_picture(run, 40, "policy", 0, PROMPTS[0], BLUE)
    newest = f"{run.samples.path}/step-00000040"
    found = read_sources([runs[0], runs[1], f"{run.samples.path}/step-00000000/policy"])
    assert [own.name for own in found] == ["one policy 40", "two policy 20", "one base"]
    assert [len(own.pictures) for own in found] == [1, len(PROMPTS), len(PROMPTS)]
    add_picture(run, 40, "ema", 0, PROMPTS[0], BLUE)
    names = [own.name for own in read_sources([runs[0], f"{newest}/policy"])]
    assert names == ["one ema 40", "one policy 40"]
    assert read_sources([newest])[0].name == "one ema 40"


def test_pictures_that_predict_drew_are_taken_too(runs, tmp_path):
    samples = tmp_path / "one" / "samples"
    samples.rename(tmp_path / "one" / "predictions")
    found = read_sources([f"{tmp_path}/one/predictions/step-00000020/policy", runs[1]])
    assert found[0].name == "one policy 20 (predictions)"
    assert found[0].pictures["prompt 3", 0].path.is_file()


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        (["one", "one/samples/step-00000020/policy"], "named twice, one policy 20: name each once"),
        (["one", "nowhere"], "nowhere holds no pictures with records"),
        (["one", "one/samples/step-00000020/ema"], "there are those of policy$"),
        (["one", "one/samples/step-00000030/ema"], "there are those of none$"),
        (["one", "other/step-00000020/ema"], "is no folder of a run's pictures: name one such as RUN/samples/"),
    ],
)
def test_what_is_not_there_is_refused(runs, tmp_path, paths, told):
    with pytest.raises(ValueError, match=told):
        read_sources([str(tmp_path / path) for path in paths])


def test_clips_are_refused_for_people_would_see_their_strips_standing_still(runs, tmp_path):
    metadata = write_run(tmp_path / "clips", BLUE).samples.metadata
    metadata.write_text(metadata.read_text().replace('"step"', '"num_frames": 17, "step"'))
    with pytest.raises(ValueError, match=r"00000.png is a strip of a clip's frames, .* with num_frames 1$"):
        read_sources([*runs, str(tmp_path / "clips")])


def test_pictures_of_one_prompt_are_paired_in_their_order_whatever_their_number(tmp_path):
    prompts = ["a", "b", "a"]
    one, two = write_run(tmp_path / "one", RED, prompts), write_run(tmp_path / "two", GREEN, ["c", *prompts])
    plan = make_plan(read_sources([str(one.path), str(two.path)]), "pairs", 3)
    assert [(own.prompt, *(picture.sample for picture in own.pictures)) for own in plan.items] == [
        ("a", 0, 1), ("b", 1, 2), ("a", 2, 3),
    ]  # fmt: skip


def test_every_two_of_three_sources_are_compared_and_every_picture_is_graded(runs, tmp_path):
    sources = read_sources([*runs, str(write_run(tmp_path / "three", BLUE).path)])
    pairs, grades = (make_plan(sources, task, 2, num_prompts=5) for task in ("pairs", "grades"))
    shown = Counter(tuple(picture.source for picture in own.pictures) for own in pairs.items)
    assert shown == {(0, 1): 5, (0, 2): 5, (1, 2): 5}
    assert Counter(own.pictures[0].source for own in grades.items) == {0: 5, 1: 5, 2: 5}
    assert (pairs.num_answers, grades.num_answers) == (15 * 2, 15 * 3 * 2)
    assert {own.prompt for own in pairs.items} != set(PROMPTS[:5])  # a random choice
    assert {own.prompt for own in make_plan(sources, "pairs", 2, 1, 5).items} != {own.prompt for own in pairs.items}


def test_order_and_sides_are_of_the_rater_and_the_seed_alone(runs, tmp_path):
    sources = read_sources([*runs, str(write_run(tmp_path / "three", BLUE).path)])
    plan, other = make_plan(sources, "grades", 3), make_plan(sources, "grades", 3, seed=1)
    orders = [plan.order("ann"), plan.order("ben"), other.order("ann")]
    assert all(sorted(order) == list(range(len(plan.items))) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert plan.order("ann") == orders[0]
    pairs = make_plan(sources, "pairs", 3)
    left = [[pairs.on_sides(rater, i)[0].source for i in range(len(pairs.items))] for rater in ("ann", "ben")]
    assert left[0] != left[1]
    first = [left[0][i] == own.pictures[0].source for i, own in enumerate(pairs.items)]
    assert 0.25 < sum(first) / len(first) < 0.75


def test_pictures_of_one_prompt_are_far_apart(runs, tmp_path):
    """Each prompt comes once before one comes again, and not always of the same source."""
    plan = make_plan(read_sources([*runs, str(write_run(tmp_path / "three", BLUE).path)]), "grades", 3)
    order = [plan.items[number] for number in plan.order("ann")]
    count = len(PROMPTS)
    for turn in range(3):
        part = order[turn * count : (turn + 1) * count]
        assert len({own.prompt for own in part}) == count
        assert len({own.pictures[0].source for own in part}) == 3


def test_pictures_that_would_be_known_by_their_size_are_refused(runs, tmp_path):
    run = write_run(tmp_path / "three", BLUE)
    add_picture(run, 20, "policy", 3, PROMPTS[3], BLUE, size=(64, 48))
    with pytest.raises(
        ValueError, match=r"differ in size, by which raters would know them: .* 48 x 48 and .* 64 x 48$"
    ):
        make_plan(read_sources([runs[0], str(run.path)]), "pairs", 3)


def test_too_little_to_show_is_refused(runs, tmp_path):
    other = str(write_run(tmp_path / "three", BLUE, ["something else"]).path)
    for paths, number, told in (
        (runs[:1], None, "rate has 1 run: name two or more"),
        ([runs[0], other], None, "0 prompts have pictures of every run; nothing can be compared"),
        (runs, 15, "14 prompts have pictures of every run; num_prompts is 15"),
    ):
        with pytest.raises(ValueError, match=told):
            make_plan(read_sources(paths), "pairs", 3, num_prompts=number)
    path = tmp_path / "two" / "samples" / "step-00000020" / "policy" / "00002.png"
    path.unlink()
    with pytest.raises(ValueError, match=re.escape(f"picture {path} is missing or damaged")):
        make_plan(read_sources(runs), "pairs", 3)


def test_a_settled_plan_cannot_change(runs, tmp_path):
    sources = read_sources(runs)
    path = tmp_path / "study" / "plan.json"
    plan = make_plan(sources, "pairs", 3)
    settle(path, plan)
    before = path.read_text()
    settle(path, make_plan(read_sources(runs), "pairs", 3))
    for changed, told in (
        (make_plan(sources, "grades", 3), "task is pairs there and grades here"),
        (make_plan(sources, "pairs", 2), "num_raters is 3 there and 2 here"),
        (make_plan(sources, "pairs", 3, seed=1), "seed is 0 there and 1 here"),
        (make_plan(sources[::-1], "pairs", 3), "sources is .* there and .* here"),
        (make_plan(sources, "pairs", 3, num_prompts=4), "other pictures"),
    ):
        with pytest.raises(ValueError, match=f"plan {re.escape(str(path))} was settled before.*{told}.*--output$"):
            settle(path, changed)
    add_picture(sources[0].run, 20, "policy", 3, PROMPTS[3], BLUE)
    with pytest.raises(ValueError, match="other pictures"):
        settle(path, make_plan(read_sources(runs), "pairs", 3))
    assert path.read_text() == before
    assert json.loads(before)["items"][13]["prompt"] == PROMPTS[13]
    path.write_text(before[:100])
    with pytest.raises(ValueError, match="cannot be read: name another folder with --output"):
        settle(path, plan)
