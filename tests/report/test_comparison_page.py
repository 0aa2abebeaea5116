"""Several runs on one page, from folders whose differences are known; and both commands as a user gives them."""

import json
from pathlib import Path

import pytest
import yaml

from srpo_lightning.cli import main
from srpo_lightning.report.comparison_page import names_of, write_comparison_page
from srpo_lightning.report.run_page import RunPage
from tests.refusals import refused
from tests.report.made_up import CLIP, CONFIG, MARKUP, PROMPTS, content_of, write_run


@pytest.fixture
def first(tmp_path):
    return write_run(tmp_path / "first", shift=0.01)


def compared(tmp_path: Path, *runs) -> tuple[dict, str]:
    path = tmp_path / "page.html"
    write_comparison_page(path, [run.path for run in runs])
    return content_of(path.read_text()), path.read_text()


def last(content: dict, kind: str = "policy") -> dict[str, list[dict]]:
    return {row["name"]: row["cells"] for row in content["last"][kind]}


def configure(run, change) -> None:
    config = yaml.safe_load(run.config().read_text())
    change(config)
    run.config().write_text(yaml.safe_dump(config))


def test_differences_are_of_the_same_samples_with_intervals(first, tmp_path):
    content, text = compared(tmp_path, first, write_run(tmp_path / "second", shift=0.03))
    assert content["runs"] == ["first", "second"]
    assert content["notes"] == []
    before, after = last(content)["judge"]
    assert before["value"] == pytest.approx(0.5 + 0.02 * 0.5)
    assert (before["difference"], before["half"] > 0) == (None, True)
    assert after["difference"] == pytest.approx(0.04 * 0.5)
    assert after["low"] < 0.02 < after["high"]
    assert last(content, "ema")["judge"][1]["difference"] == pytest.approx(0.08 * 0.5)
    assert last(content)["share/<b>"][1] == {
        "value": 0.5, "half": None, "difference": 0.0, "low": None, "high": None, "is_same": True,
    }  # fmt: skip
    assert content["prompts"] == [{"index": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS[:3])]
    assert content["settings"] == []
    for block in ("base", "0/policy", "1/policy", "0/ema", "1/ema"):
        assert f'data-pictures="{block}">{{"0": "data:image/webp;base64,' in text
    assert "<img" not in text


def test_curves_lie_over_each_other(first, tmp_path):
    content, _ = compared(tmp_path, first, write_run(tmp_path / "second", shift=0.03))
    chart = next(own for own in content["charts"] if (own["name"], own["kind"]) == ("judge", "policy"))
    assert [own["name"] for own in chart["series"]] == ["first", "second"]
    assert [step for step, _ in chart["series"][1]["points"]] == [0, 10, 20]


def test_of_a_step_that_was_measured_again_the_last_numbers_count_in_whatever_order(first, tmp_path):
    second = write_run(tmp_path / "second", shift=0.03)
    before = {"weights": "policy", "judge": 0.7, "held_out": 0.7}
    second.metrics.write_text(f"{json.dumps({'step': 20, **before})}\n{second.metrics.read_text()}")
    second.append_metrics({"step": 10, **before})
    content, _ = compared(tmp_path, first, second)
    assert last(content)["judge"][1]["value"] == pytest.approx(0.5 + 0.06 * 0.5)
    (chart,) = [own for own in content["charts"] if (own["name"], own["kind"]) == ("judge", "policy")]
    assert chart["series"][1]["points"] == [[0, 0.5], [10, 0.7], [20, pytest.approx(0.5 + 0.06 * 0.5)]]
    page = RunPage(second).content()[0]
    (judge,) = [row["cells"] for row in page["last"] if row["name"] == "judge"]
    assert judge["policy"]["value"] == pytest.approx(0.5 + 0.06 * 0.5)
    assert page["findings"] == ["Held-out score of the policy: 0.250 before training, 0.280 at step 20.",
                                "It was best at step 10: 0.700."]  # fmt: skip


def test_runs_on_other_prompts_have_no_intervals_and_it_is_said(first, tmp_path):
    second = write_run(tmp_path / "second", prompts=["another", *PROMPTS[1:]])
    content, _ = compared(tmp_path, first, second)
    assert last(content)["judge"][1]["low"] is None
    (note,) = content["notes"]
    assert note.startswith("second is not compared sample by sample with first: other prompts.")


def test_runs_from_other_noise_show_no_pictures_side_by_side(first, tmp_path):
    second = write_run(tmp_path / "second")
    second.samples.metadata.write_text(second.samples.metadata.read_text().replace('"seed": 3', '"seed": 4'))
    content, _ = compared(tmp_path, first, second)
    assert content["prompts"] == []
    assert "other noise" in content["notes"][0]


def test_numbers_of_another_reward_are_not_subtracted(first, tmp_path):
    second = write_run(tmp_path / "second")
    other = {"class_path": CLIP, "init_args": {"pretrained": "another"}}
    configure(second, lambda config: config["model"].update(reward=other))
    content, _ = compared(tmp_path, first, second)
    rows = last(content)
    assert not rows["reward"][1]["is_same"]
    assert rows["reward"][1]["difference"] is None
    assert rows["judge"][1]["is_same"]
    assert rows["saturation"][1]["is_same"]
    assert content["settings"] == [{"name": "model.reward.pretrained", "values": ["the-reward", "another"]}]


def test_another_objective_changes_what_reward_and_judge_are_unless_their_form_is_given(first, tmp_path):
    second = write_run(tmp_path / "second")
    words = {"positive": ["dull"], "negative": []}
    configure(second, lambda config: config["model"]["objective"]["init_args"].update(control_words=words))
    rows = last(compared(tmp_path, first, second)[0])
    assert not any(rows[name][1]["is_same"] for name in ("reward", "judge", "held_out"))
    form = {"class_path": "srpo_lightning.objectives.Plain", "init_args": {}}
    for run in (first, second):
        configure(run, lambda config: config["trainer"]["callbacks"][0]["init_args"].update(form=form))
    rows = last(compared(tmp_path, first, second)[0])
    assert all(rows[name][1]["is_same"] for name in ("reward", "judge", "held_out"))


@pytest.mark.parametrize(("settings", "is_same"), [({}, True), ({"template": "{word} {prompt}"}, False)])
def test_objectives_are_told_apart_by_what_their_scores_read_not_by_how_they_are_written(
    first, tmp_path, settings, is_same
):
    second = write_run(tmp_path / "second")
    words = CONFIG["model"]["objective"]["init_args"]["control_words"]
    trained = {"word_choice": "random", "others": 2, "extra_weight": 0.3}
    form = {"class_path": "srpo_lightning.objectives.Relative",
            "init_args": {"control_words": words, "template": "{word}. {prompt}", **trained, **settings}}  # fmt: skip
    other = {"class_path": "srpo_lightning.objectives.DirectAlign", "init_args": {"form": form}}
    configure(second, lambda config: config["model"].update(objective=other))
    rows = last(compared(tmp_path, first, second)[0])
    assert [rows[name][1]["is_same"] for name in ("reward", "judge", "held_out")] == [is_same] * 3


def test_a_plain_reward_is_the_same_whether_it_is_named_or_not(first, tmp_path):
    second = write_run(tmp_path / "second")
    forms = (None, {"class_path": "srpo_lightning.objectives.Plain", "init_args": {"template": "{prompt}"}})
    for run, form in zip((first, second), forms, strict=True):
        objective = {"class_path": "srpo_lightning.objectives.DRaFT", "init_args": {"form": form}}
        configure(run, lambda config, own=objective: config["model"].update(objective=own))
    assert last(compared(tmp_path, first, second)[0])["judge"][1]["is_same"]


def test_runs_are_named_by_what_tells_them_apart():
    assert names_of([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert names_of([Path("/x/a/run"), Path("/x/b/run"), Path("/y/run")]) == ["a/run", "b/run", "y/run"]


def test_compare_and_report_write_their_pages(first, tmp_path, capsys):
    second = write_run(tmp_path / "second")
    output = tmp_path / "new" / "both.html"
    main(["compare", str(first.path), str(second.path), "--output", str(output)])
    assert content_of(output.read_text())["runs"] == ["first", "second"]
    main(["report", str(first.path), str(second.path)])
    assert content_of(second.page.read_text())["samples"]["prompts"][1] == MARKUP
    assert capsys.readouterr().out.splitlines() == [str(output), str(first.page), str(second.page)]
    first.prompts.write_text("{")
    main(["report", str(first.path)])
    assert f"left out: {first.prompts} cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["compare", "first"], "compare has 1 run: name two or more, or take `report` for one"),
        (["compare", "first", "first"], "a run is named twice"),
        (["compare", "first", "nowhere"], r"nowhere holds no evaluations \(metrics.jsonl\): name a run's folder"),
        (["compare", "first", "first/../first", "--output", "."], "output is ., a folder: name a .html file"),
        (["report", "nowhere"], "nowhere holds no evaluations"),
        (["report"], "runs"),
        (["report", "first", "--otput", "x"], "otput: there is no such setting"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(first, tmp_path, monkeypatch, capsys, arguments, cure):
    monkeypatch.chdir(tmp_path)
    refused(arguments, cure, capsys)
