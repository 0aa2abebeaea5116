"""The run at true size, at a small one: every phase, in its order."""

import json
import os

from benchmarks import true_size


def test_every_phase_is_run_and_measured(tmp_path, capfd):
    assets = "srpo_lightning/assets"
    true_size.true_size(
        policy=f"{assets}/emoji-flux", reward=f"{assets}/emoji-clip", output=str(tmp_path / "out"), pixels=32,
        text_tokens=16, num_rollout_steps=1, dtype="float32",
    )  # fmt: skip
    phases = json.loads((tmp_path / "out" / "phases.json").read_text())
    assert [phase["name"] for phase in phases] == [
        "cache", "fit, two steps", "resume, one step", "predict, one picture", "export", "diffusers alone",
    ]  # fmt: skip
    assert all(phase["seconds"] > 0 and phase["own_peak_bytes"] > 1 << 26 for phase in phases)
    assert all(phase["peak_bytes"] > phase["own_peak_bytes"] for phase in phases)
    assert phases[1]["predicted_bytes"] > 1 << 29
    assert "diffusers read 132 tensors of the adapter" in capfd.readouterr().out


MAPS = """
import mmap, sys, time
with open(sys.argv[1], "rb") as stream:
    pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
seen = sum(pages[:: mmap.PAGESIZE])
time.sleep(0.5)
"""


def test_pages_of_a_file_count_only_beside_the_memory_of_its_own(tmp_path):
    (tmp_path / "empty").write_bytes(b"0")
    (tmp_path / "large").write_bytes(os.urandom(1 << 20) * 64)
    took = {
        name: true_size.measured(name, ["-c", MAPS, str(tmp_path / name)], tmp_path / "log")
        for name in ("empty", "large")
    }
    assert took["large"].peak_bytes - took["empty"].peak_bytes > 60 << 20
    assert took["large"].own_peak_bytes - took["empty"].own_peak_bytes < 4 << 20
