"""Two gloo processes write the pictures that one writes, list each once and draw none again."""

import json

from tests import processes, tiny


def test_two_ranks_write_what_one_writes_and_keep_it(models, features, tmp_path):
    """Three prompts, so that one rank fills its last batch up with a picture of the other."""
    settings = tiny.config(models, tmp_path / "run", features)
    settings["data"]["eval_batch_size"] = 1
    settings["trainer"]["callbacks"] = []
    said = {}
    for call, devices in (("one", 1), ("two", 2), ("again", 2)):
        own = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
        config, output = tmp_path / f"{call}.json", tmp_path / ("one" if call == "one" else "two")
        config.write_text(json.dumps(settings | {"trainer": settings["trainer"] | own}))
        done = processes.start(["predict", "--config", str(config), "--output", str(output)], devices)
        assert done.returncode == 0, done.output
        said[call] = [line for line in done.output.splitlines() if line.startswith("predict: ")]
    assert said["two"] == [f"predict: 3 pictures in {tmp_path / 'two'}: 3 drawn, 0 kept, 0 drawn again"]
    assert said["again"] == [f"predict: 3 pictures in {tmp_path / 'two'}: 0 drawn, 3 kept, 0 drawn again"]
    for name in ["metadata.jsonl", *(f"step-00000000/policy/0000{i}.png" for i in range(3))]:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
