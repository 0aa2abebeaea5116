"""The run at true size, at a small one: every phase, in its order."""

import json

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
    assert all(phase["seconds"] > 0 and phase["peak_bytes"] > 1 << 27 for phase in phases)
    assert phases[1]["predicted_bytes"] > 1 << 29
    assert "diffusers read 132 tensors of the adapter" in capfd.readouterr().out
