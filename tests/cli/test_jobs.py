"""`control-words` from the command line, on pictures whose contrast is known."""

import json

import pytest
import torch
from PIL import Image

from srpo_lightning.cli import main
from srpo_lightning.jobs import control_words as job
from srpo_lightning.rewards import Reward


class Red(Reward):
    """Understands two words, red and blue; of any other it sees the length."""

    def forward(self, images, texts):
        return torch.stack([self.one(image, text.split(".")[0]) for image, text in zip(images, texts, strict=True)])

    def one(self, image, word):
        channels = {"red": 0, "blue": 2}
        return image[channels[word]].mean() if word in channels else 1e-3 * len(word) * image.square().mean()


REWARD = ["--reward", "tests.cli.test_jobs.Red"]


def write(folder, colours, size=(4, 6)):
    folder.mkdir()
    for number, colour in enumerate(colours):
        Image.new("RGB", size, colour).save(folder / f"{number:02}.png")
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\nc")
    reds = write(tmp_path / "reds", [(255, 0, 0), (204, 0, 0), (255, 0, 51)])
    blues = write(tmp_path / "blues", [(0, 0, 255), (0, 51, 255), (51, 0, 204)], size=(8, 8))
    return reds, blues, str(tmp_path / "prompts.txt")


def run(arguments, tmp_path):
    main(["control-words", *REWARD, *arguments, "--output", str(tmp_path / "table.json")])
    record = json.loads((tmp_path / "table.json").read_text())
    return {pair["words"]: pair for pair in record["pairs"]}, record


def test_the_tables_folder_is_made(pictures, tmp_path):
    reds, _, prompts = pictures
    arguments = ["--images", reds, "--prompts", prompts, "--words", "[red/blue]"]
    main(["control-words", *REWARD, *arguments, "--output", str(tmp_path / "new" / "table.json")])
    assert json.loads((tmp_path / "new" / "table.json").read_text())["num_pictures"] == 3


def test_a_known_pair_is_told_from_an_unknown_one(pictures, tmp_path, capsys):
    reds, blues, prompts = pictures
    arguments = ["--images", reds, "--against", blues, "--prompts", prompts, "--words", "[red/blue, odd/strange]"]
    pairs, record = run(arguments, tmp_path)
    known, unknown = pairs["red/blue"], pairs["odd/strange"]
    differences = torch.tensor([1, 0.8, 0.8, -1, -1, -0.6])
    assert known["contrast"] == pytest.approx(float(differences.mean()), abs=1e-6)
    assert known["spread"] == pytest.approx(float(differences.std()), abs=1e-6)
    assert known["auc"] == 1
    assert known["separation"] > 100 * unknown["separation"]
    assert known["pull"] > 100 * unknown["pull"] > 0
    lengths = 4 / (11 / 6) ** 0.5  # 7 - 3, over the root mean square of those of the invented words
    assert unknown["separation"] == pytest.approx(lengths, rel=1e-4)
    assert unknown["auc"] == pytest.approx(5 / 9)
    assert record["num_pictures"] == 6
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table if "/" in line.split()[0]] == ["red/blue", "odd/strange"]


def test_prompts_are_found_by_the_pictures_names(pictures, tmp_path):
    reds, _, _ = pictures
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n".join(json.dumps({"file": f"reds/{i:02}.png", "prompt": str(i)}) for i in (2, 0, 1)))
    assert [(p.path.name, p.prompt) for p in job.read_pictures(reds, str(metadata))] == [
        ("00.png", "0"), ("01.png", "1"), ("02.png", "2"),
    ]  # fmt: skip
    run(["--images", reds, "--prompts", str(metadata), "--words", "[red/blue]"], tmp_path)
    metadata.write_text(
        "\n".join(json.dumps({"file": f"reds/{i:02}.png", "prompt": "a\u2028b"}, ensure_ascii=False) for i in range(3))
    )
    assert job.read_pictures(reds, str(metadata))[2].prompt == "a\u2028b"
    metadata.write_text(json.dumps({"file": "reds/00.png", "prompt": "0"}))
    with pytest.raises(ValueError, match=r"names no prompt for .*01.png and 1 other"):
        job.read_pictures(reds, str(metadata))


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        ({"--words": "[redblue]"}, "write a positive and a negative word as positive/negative"),
        ({"--words": None}, r"Red brings no word lists: name pairs, --words '\[Real/Painting\]'"),
        ({"--images": "/nowhere"}, "/nowhere holds 0 pictures"),
        ({"--prompts": "short.txt"}, "holds 1 prompts and .* 3 pictures: give one prompt for each"),
        ({"--prompts": "odd.jsonl"}, "odd.jsonl: file is 5, expected a text"),
        ({"--words": "[]"}, r"--words is \[\]: name pairs"),
        ({"--template": "{prompt}"}, r"template is '{prompt}': it must contain {word} and {prompt}"),
        ({"--template": "{prompt} {wrd}"}, r"template is .*: in braces it may have {word} and {prompt} alone"),
        ({"--output": "."}, "output is ., a folder: name a .json file"),
        ({"--max_picture_megapixels": "1"}, r"02.png has 1200 x 1000 pixels, more than max_picture_megapixels \(1\)"),
        ({"--max_picture_megabytes": "1"}, r"02.png has 4 MB, more than max_picture_megabytes \(1\): raise that"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pictures, tmp_path, change, cure, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "odd.jsonl").write_text('{"file": 5, "prompt": "a"}')
    monkeypatch.setattr(Red, "load", lambda _: pytest.fail("the reward was read"))
    if any("max_picture" in option for option in change):
        Image.new("RGB", (1200, 1000)).save(tmp_path / "reds" / "02.png", compress_level=0)
    options = {"--images": pictures[0], "--prompts": pictures[2], "--words": "[red/blue]"} | change
    with pytest.raises(SystemExit, match=cure):
        main(["control-words", *REWARD, *(part for o, v in options.items() if v for part in (o, v))])
