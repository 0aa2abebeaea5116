import json
import os
import random
import stat

import pytest
import torch

from srpo_lightning.evaluation.comparison import (
    BASE,
    LABEL,
    by_tag,
    compare,
    read_table,
    save_table,
    summary,
    write_comparison,
)
from srpo_lightning.evaluation.metrics import Table, bootstrap_mean, cmmd, diversity

NUM_PROMPTS = 6


def table(seed: int, shift: float = 0.0) -> Table:
    """Twelve samples of six prompts."""
    draw = torch.Generator().manual_seed(seed)
    columns = {name: torch.randn(12, generator=draw, dtype=torch.float64) + shift for name in ("judge", "saturation")}
    columns[LABEL] = torch.tensor([0, 1, 1, 2] * 3).double()
    indices = torch.arange(12)
    return Table(indices, indices % NUM_PROMPTS, columns, torch.randn(12, 4, generator=draw))


def test_a_summary_is_means_shares_and_the_comparison_with_the_base():
    base, now = table(0), table(1, shift=0.5)
    numbers = summary(now, base, ["a", "b", "c"])
    won = sum(float(n > b) for n, b in zip(now.columns["judge"], base.columns["judge"], strict=True)) / 12
    assert numbers["judge"] == pytest.approx(float(now.columns["judge"].mean()))
    assert (numbers["share/a"], numbers["share/b"], numbers["share/c"]) == pytest.approx((0.25, 0.5, 0.25))
    assert numbers["diversity"] == diversity(now.features)
    assert numbers["drift"] == cmmd(now.features, base.features)
    assert numbers["win/judge"] == pytest.approx(won)
    assert "win/saturation" not in numbers
    assert LABEL not in numbers


def test_samples_of_other_prompts_are_not_compared():
    base = table(0)
    other = base._replace(indices=base.indices + 1)
    assert not {"drift", "win/judge"} & summary(other, base, []).keys()


def test_tags_choose_the_samples_of_their_prompts():
    tags = [["cat"], [], ["dog", "cat"], [], [], ["dog"]]
    parts = by_tag(table(0), tags)
    assert {name: part.indices.tolist() for name, part in parts.items()} == {"cat": [0, 2, 6, 8], "dog": [2, 5, 8, 11]}


def test_the_comparison_is_written_with_every_number_and_read_by_people(tmp_path):
    tables = {BASE: table(0), "policy": table(1, shift=3.0)}
    compared = compare(tables, [["cat"]] * 3 + [[]] * 3)
    text = write_comparison(tmp_path / "validation" / "step-1", compared, {"step": 1})
    content = json.loads((tmp_path / "validation" / "step-1.json").read_text())
    judge = content["compared"]["all"]["policy"]["judge"]
    column = tables["policy"].columns["judge"]
    assert content["step"] == 1
    assert judge["mean"]["value"] == pytest.approx(float(column.mean()))
    assert judge["std"] == pytest.approx(float(column.std()))
    assert judge["quantiles"][2] == pytest.approx(float(column.median() + column.sort().values[6]) / 2)
    assert judge["win"]["value"] == bootstrap_mean((column > tables[BASE].columns["judge"]).double()).value
    assert content["compared"]["all"]["policy"]["saturation"]["win"] is None
    assert set(content["compared"]) == {"all", "cat"}
    assert text == (tmp_path / "validation" / "step-1.md").read_text()
    assert "| | base | policy | policy wins |" in text
    assert "### cat" in text


def test_without_a_base_nothing_wins(tmp_path):
    text = write_comparison(tmp_path / "x", compare({"policy": table(0)}), {})
    assert "wins" not in text
    assert len(text.splitlines()) == 6


def test_a_table_is_read_back_whole_and_only_under_its_key(tmp_path):
    path, whole = tmp_path / "tables" / "base.safetensors", table(0)
    save_table(path, whole, "these prompts")
    found = read_table(path, "these prompts")
    for name, column in whole.columns.items():
        assert torch.equal(found.columns[name], column)
    assert torch.equal(found.indices, whole.indices)
    assert torch.equal(found.groups, whole.groups)
    assert torch.equal(found.features, whole.features)
    assert read_table(path, "other prompts") is None
    assert read_table(tmp_path / "nowhere") is None
    assert [file.name for file in path.parent.iterdir()] == ["base.safetensors"]


def test_one_sample_has_no_deviation():
    measured = compare({"policy": table(0).where(torch.arange(12) == 3)})["all"]["policy"]["judge"]
    assert measured.std == 0
    assert not measured.mean.is_known


def changed(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


def test_no_table_of_which_a_bit_is_flipped_or_an_end_is_lost_is_read(tmp_path):
    """200 flips and 50 cuts: measured again where a key says how, refused in one line elsewhere."""
    path, chance = tmp_path / "base.safetensors", random.Random(0)
    save_table(path, table(0), "key")
    content = path.read_bytes()
    assert torch.equal(read_table(path, "key").features, table(0).features)
    damaged = [changed(content, chance) for _ in range(200)]
    damaged += [content[: chance.randrange(len(content))] for _ in range(49)] + [b""]
    for body in damaged:
        path.write_bytes(body)
        with pytest.warns(UserWarning, match=f"table {path} is damaged, .*: it is measured again"):
            assert read_table(path, "key") is None
        with pytest.raises(ValueError, match=f"^table {path} is damaged, .*: delete it, and measure it again with"):
            read_table(path)


def test_a_table_is_for_everybody_whom_the_umask_allows_to_read_it(tmp_path):
    path = tmp_path / "base.safetensors"
    save_table(path, table(0), "key")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
