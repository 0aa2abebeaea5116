"""`predict` that is killed and called again leaves what one that was never killed leaves."""

import json
import random
import signal
from functools import partial
from pathlib import Path

from srpo_lightning.callbacks import predictions
from srpo_lightning.cli import main
from tests import processes, tiny

NUM_PROMPTS = 40
KILLED_AFTER = (1, 8, 8)  # pictures of each call; the rest is more than a call can draw until its end
SECONDS = 0.05  # of processor time, so that it matters to no machine how busy it is


def end_after(num_pictures: int, seconds: float) -> None:
    """Have this process end at any instruction, no handler being asked, that much processor time after a picture."""
    write, written = predictions.write_picture, []

    def counted(*args) -> None:
        write(*args)
        written.append(args)
        if len(written) == num_pictures:
            signal.setitimer(signal.ITIMER_PROF, seconds)

    predictions.write_picture = counted


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_predict_that_is_called_again_leaves_the_same_pictures_and_metadata(models, features, tmp_path):
    prompts = tmp_path / "many.txt"
    prompts.write_text("\n".join(f"c{i}" for i in range(NUM_PROMPTS)))
    settings = tiny.config(models._replace(evaluation=prompts), tmp_path / "run", features)
    settings["data"]["eval_batch_size"] = 1
    settings["trainer"]["callbacks"] = []
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))
    arguments = ["predict", "--config", str(config), "--output"]
    main([*arguments, str(tmp_path / "whole")])
    chance, log = random.Random(0), tmp_path / "log"
    for num_pictures in KILLED_AFTER:
        kill = partial(end_after, num_pictures, chance.uniform(1e-4, SECONDS))
        process = processes.launch([*arguments, str(tmp_path / "killed")], log, before=kill)
        process.join()
        assert process.exitcode == -signal.SIGPROF, log.read_text()
        assert len(list((tmp_path / "killed").rglob("*.png"))) < NUM_PROMPTS
        assert not (tmp_path / "killed" / "metadata.jsonl").exists()
    main([*arguments, str(tmp_path / "killed")])
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
