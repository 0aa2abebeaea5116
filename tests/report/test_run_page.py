"""What the page of a run says, from a folder whose numbers are known, also where some of it is damaged."""

import base64
import io
import json
import math
import os
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from srpo_lightning.evaluation.meanings import meaning
from srpo_lightning.report import samples
from srpo_lightning.report.curves import TrainingScalars, smoothed
from srpo_lightning.report.page import page
from srpo_lightning.report.run_page import RunPage
from srpo_lightning.report.thumbnails import MAX_PICTURES, Thumbnails
from tests.report.made_up import CONFIG, MARKUP, PROMPTS, STEPS, content_of, picture, table, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Read-only."""
    return write_run(tmp_path_factory.mktemp("made_up") / "run")


@pytest.fixture(scope="module")
def content(run):
    found = RunPage(run)
    content, _ = found.content()
    assert found.notes == []
    return content


def colour(uri: str) -> tuple[int, int, int]:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        return picture.convert("RGB").getpixel((5, 5))


def test_what_was_asked_for_is_said_in_words(content):
    asked = dict(map(tuple, content["asked"]))
    assert asked["Objective"] == "SRPO (margin 0.9)"
    assert asked["Control words"] == "towards bright, <b>; away from dark"
    assert asked["Reward"] == "ClipReward (pretrained the-reward)"
    assert asked["Judge"] == "ClipReward (pretrained the-judge)"
    assert asked["Model"] == "FluxPolicy (pretrained the-model)"
    assert asked["Steps"] == "20 evaluated of 40"
    assert asked["Software"].startswith("srpo_lightning ")


def test_curves_have_every_evaluation_and_the_base(content):
    charts = {own["name"]: {s["name"]: s["points"] for s in own["series"]} for own in content["charts"]}
    assert [own["name"] for own in content["charts"]] == ["held_out", "reward", "judge", "share/<b>", "saturation"]
    assert [step for step, _ in charts["judge"]["policy"]] == list(STEPS)
    assert [step for step, _ in charts["judge"]["ema"]] == [10, 20]
    assert charts["judge"]["base"] == [(0, 0.5)]
    assert charts["judge"]["policy"][2][1] == pytest.approx(0.5 + 0.02 * 0.5)
    assert content["meanings"]["share/<b>"] == meaning("share/<b>")


def test_every_sample_is_listed_beside_the_bases(content):
    found = content["samples"]
    assert (found["step"], found["weights"], found["total"]) == (20, ["policy", "ema"], 8)
    assert found["columns"] == ["held_out", "judge", "reward"]  # more saturation is not better
    assert found["prompts"] == [PROMPTS[i % 4] for i in range(8)]
    assert not found["has_unnamed"]
    changes = [
        ours - base
        for ours, base in zip(found["values"]["policy"]["judge"], found["values"]["base"]["judge"], strict=True)
    ]
    assert changes == pytest.approx([0.02 * (i - 3) for i in range(8)])


def test_the_last_values_have_intervals_and_win_rates(content):
    rows = {row["name"]: row["cells"] for row in content["last"]}
    assert rows["judge"]["policy"]["win"][0] == pytest.approx(9 / 16)  # four of eight are better, one is alike
    assert rows["judge"]["policy"]["half"] > 0
    assert rows["judge"]["base"]["value"] == 0.5
    assert rows["saturation"]["ema"]["win"] is None


def test_the_guards_words_and_the_findings_are_there(content):
    (own,) = content["advice"]
    assert (own["step"], own["acts"]) == (10, False)
    assert own["text"] == "diversity is <i>low</i>. The guard waits; the best held-out score was at step 0."
    assert content["findings"] == ["Held-out score of the policy: 0.250 before training, 0.260 at step 20."]


def test_the_pictures_are_those_of_their_step_weights_and_prompt(run):
    content, pictures = RunPage(run).content()
    assert content["grid"]["steps"] == [10, 20]
    assert [own["prompt"] for own in content["grid"]["prompts"]] == PROMPTS[:3]
    assert pictures.keys() == {"base", "10", "20"}
    for block, key, expected in (
        ("base", "2", (0, 0, 160)),
        ("20", "policy/1", (200, 0, 80)),
        ("10", "ema/0", (100, 100, 0)),
    ):
        assert colour(pictures[block][key]) == pytest.approx(expected, abs=6)


def test_the_configuration_is_whole_and_says_what_is_not_the_default(content):
    found = content["configuration"]
    assert "positive:" in found["text"]
    assert found["departures"]["from"] == "the defaults of its classes"
    rows = {name: (now, then) for name, now, then in found["departures"]["rows"]}
    assert rows["data.batch_size"] == (5, 4)
    assert rows["model.objective.margin"][0] == 0.9
    assert rows["trainer.max_steps"] == (40, -1)
    assert "trainer.callbacks[RewardTracking].top_k" not in rows  # it is the default
    assert "trainer.default_root_dir" not in rows


def test_with_the_recipe_recorded_the_settings_that_were_changed_are_listed(run, tmp_path):
    copy = type(run)(shutil.copytree(run.path, tmp_path / "run"))
    recipe = json.loads(json.dumps(CONFIG))
    recipe["model"]["objective"]["init_args"]["margin"] = 0.7
    recipe["trainer"]["callbacks"].append({"class_path": "srpo_lightning.callbacks.EMA", "init_args": {"decay": 0.5}})
    copy.recipe.write_text(json.dumps({"files": ["configs/<b>.yaml"], "settings": recipe}))
    found = RunPage(copy).content()[0]["configuration"]["departures"]
    assert found["from"] == "configs/<b>.yaml"
    assert found["rows"] == [("model.objective.margin", 0.9, 0.7), ("trainer.callbacks[EMA]", None, "EMA")]


def test_the_configuration_is_the_last_starts_whatever_the_times_of_its_files(run, tmp_path):
    copy = type(run)(shutil.copytree(run.path, tmp_path / "run"))
    for number, step in enumerate((10, 20)):
        path = copy.config(copy.checkpoint(step))
        path.write_text(json.dumps(CONFIG | {"seed_everything": step}))
        os.utime(path, (number, number))
    os.utime(copy.config(copy.checkpoint(10)))
    assert json.loads(RunPage(copy).content()[0]["configuration"]["text"])["seed_everything"] == 20


def test_prompts_that_were_not_recorded_have_the_texts_of_their_pictures(tmp_path):
    found = RunPage(write_run(tmp_path / "run", prompts=None)).content()[0]["samples"]
    assert found["prompts"][:4] == [*PROMPTS[:3], "prompt 3"]
    assert found["has_unnamed"]


class Elements(HTMLParser):
    """The elements of a page, and the text in its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_text_from_elsewhere_is_never_markup(run):
    path = RunPage(run).write()
    text = path.read_text()
    parser = Elements()
    parser.feed(text)
    tags = [tag for tag, _ in parser.found]
    assert tags.count("script") == 1 + 1 + 3  # content, base and two steps, and the page's own
    assert "img" not in tags
    assert "b" not in tags
    assert not any(name.startswith("on") for _, attributes in parser.found for name in attributes)
    assert content_of(text)["samples"]["prompts"][1] == MARKUP
    assert "{{" not in text.replace("{{script}}", "")  # every place is filled, and what was filled in is left as it is
    assert "\u2028" not in text


def test_a_title_is_text_too():
    assert "<title>a&lt;/title&gt;&lt;script&gt;&quot;</title>" in page('a</title><script>"', "run.js", {}, {})


def test_the_page_loads_nothing_and_runs_its_own_script_alone(run):
    parser = Elements()
    text = RunPage(run).write().read_text()
    parser.feed(text)
    policy = next(own["content"] for tag, own in parser.found if own.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not any(own.get(name) for tag, own in parser.found for name in ("src", "href"))


def damaged_events(logs):
    """What a disk has made of a file of TensorBoard: its beginning, then anything."""
    with SummaryWriter(str(logs)) as writer:
        writer.add_scalar("train/loss", 1.0, 0)
    (file,) = logs.iterdir()
    file.write_bytes(file.read_bytes() + bytes(range(256)) * 4)


DAMAGES = {
    "metrics": lambda run: run.metrics.write_text("nonsense\n"),
    "half a record": lambda run: run.metrics.write_text('{"step": 1}\n{"step": 2, "weights": "ema", "judge": "x"}\n'),
    "pictures' records": lambda run: run.samples.metadata.write_text('{"step": 1}\n[]\n'),
    "records of nothing": lambda run: run.samples.metadata.write_text('{"step": 1, "index": "a", "weights": 3}\n'),
    "a table": lambda run: run.table(20, "policy").write_bytes(b"\x00" * 100),
    "the base's table": lambda run: run.base_table.write_bytes(b"\xff"),
    "the configuration": lambda run: run.config().write_text("trainer: [\n"),
    "odd settings": lambda run: run.config().write_text("trainer: 5\nmodel: [1]\n"),
    "a recipe": lambda run: run.recipe.write_text("{"),
    "prompts": lambda run: run.prompts.write_text('[{"a": 1}]'),
    "advice": lambda run: run.advice.write_text('{"step": "x"}\n'),
    "curves": lambda run: damaged_events(run.logs),
    "not text": lambda run: run.config().write_bytes(b"\xff\xfe\x00"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_read_is_left_out_and_said(damage, tmp_path):
    run = write_run(tmp_path / "run")
    DAMAGES[damage](run)
    found = RunPage(run)
    text = found.write().read_text()
    content = content_of(text)
    assert content["notes"] == found.notes
    if damage not in ("half a record", "records of nothing", "curves"):  # which say what they can
        assert found.notes
    if damage not in ("metrics", "half a record"):
        assert content["charts"]


def test_a_damaged_picture_leaves_its_place_empty(tmp_path):
    run = write_run(tmp_path / "run")
    run.samples.picture(20, "policy", 0).write_bytes(b"\x89PNG nothing")
    found = RunPage(run)
    with pytest.warns(UserWarning, match="is damaged"):
        _, pictures = found.content()
    assert "policy/0" not in pictures["20"]
    assert "policy/1" in pictures["20"]


def test_numbers_that_are_none_are_shown_as_none(tmp_path):
    run = write_run(tmp_path / "run")
    run.append_metrics({"step": 30, "weights": "policy", "judge": math.nan, "held_out": math.inf})
    content = content_of(RunPage(run).write().read_text())
    judge = next(own for own in content["charts"] if own["name"] == "judge")
    assert judge["series"][0]["points"][-1] == [30, None]


def test_an_empty_folder_has_a_page_too(tmp_path):
    content, pictures = RunPage(type(write_run(tmp_path / "run"))(tmp_path)).content()
    assert (content["charts"], content["samples"], content["notes"]) == ([], None, [])
    assert pictures == {"base": {}}


def test_a_page_reads_again_only_what_is_new(run, monkeypatch):
    found = RunPage(run)
    _, first = found.content()
    monkeypatch.setattr("srpo_lightning.report.thumbnails.data_uri", lambda picture: pytest.fail("read again"))
    assert found.content()[1] == first
    assert MAX_PICTURES > len(found.thumbnails._kept) == 3 * 5
    monkeypatch.undo()
    assert Thumbnails().url(run.samples.picture(10, "ema", 0)) == first["10"]["ema/0"]


def test_of_many_samples_the_worst_and_the_best_are_listed(run, monkeypatch):
    monkeypatch.setattr(samples, "MAX_SAMPLES", 4)
    found = RunPage(run).content()[0]["samples"]
    assert (found["indices"], found["total"]) == ([0, 1, 6, 7], 8)
    assert all(len(column) == 4 for own in found["values"].values() for column in own.values())
    assert found["counts"]["policy"]["judge"] == {"won": 4, "lost": 3, "alike": 1, "unknown": 0}


def test_a_sample_without_a_number_is_neither_won_nor_lost_nor_alike():
    ours, base = table(0.01), table(0)
    ours.columns["judge"][0], ours.columns["judge"][7], base.columns["judge"][6] = math.nan, math.inf, math.nan
    found = samples.won_and_lost(20, {"base": base, "policy": ours, "ema": table(0.02)}, {})["counts"]
    assert found["policy"]["judge"] == {"won": 2, "lost": 2, "alike": 1, "unknown": 3}
    assert found["policy"]["reward"] == {"won": 4, "lost": 3, "alike": 1, "unknown": 0}
    assert found["ema"]["judge"] == {"won": 3, "lost": 3, "alike": 1, "unknown": 1}


@pytest.mark.parametrize(("most", "steps"), [(33, [10, 20, 30, 40, 50]), (32, [10, 30, 50]), (21, [10, 30, 50])])
def test_pictures_are_bounded_by_leaving_out_steps(tmp_path, monkeypatch, most, steps):
    """Three of the base, and six of each step."""
    run = write_run(tmp_path / "run")
    lines = [picture(run, step, weights, i) for step in (30, 40, 50) for weights in ("policy", "ema") for i in range(3)]
    run.samples.metadata.write_text(run.samples.metadata.read_text() + "".join(json.dumps(own) + "\n" for own in lines))
    monkeypatch.setattr(samples, "MAX_PICTURES", most)
    content, pictures = RunPage(run).content()
    assert (content["grid"]["steps"], content["grid"]["all"]) == (steps, 5)
    assert sum(map(len, pictures.values())) == 3 + 6 * len(steps) <= most


def test_a_step_that_was_logged_again_after_a_kill_counts_once(tmp_path):
    run = write_run(tmp_path / "run")
    for values in ({0: 1.0, 1: 2.0, 2: 9.0}, {2: 3.0, 3: 4.0}):
        with SummaryWriter(str(run.logs), filename_suffix=f".{len(values)}") as writer:
            for step, value in values.items():
                writer.add_scalar("train/loss", value, step)
    assert TrainingScalars().read(run) == {"train/loss": [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)]}


def test_long_curves_are_means_of_neighbouring_steps():
    assert smoothed([(step, float(step)) for step in range(7)], 3) == [(2, 1.0), (5, 4.0), (6, 6.0)]
