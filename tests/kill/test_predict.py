"""`predict` that is killed and called again leaves what one that was never killed leaves."""

import json
import random
import signal
import time
from functools import partial
from pathlib import Path

from srpo_lightning.callbacks import predictions
from srpo_lightning.cli import main
from tests import processes, tiny

NUM_PROMPTS = 40
KILLED_AFTER = (2, 8, 8)  # pictures of each call
PICTURES_MORE = 2.0  # at most, until a call ends


def end_after(num_pictures: int, pictures_more: float) -> None:
    """Have this process end at any instruction, no handler being asked, some pictures later.

    They are told by the processor time that a picture takes here, however fast this machine and whatever else it does.
    """
    write, written_s = predictions.write_picture, []

    def counted(*args) -> None:
        write(*args)
        written_s.append(time.process_time())
        if len(written_s) == num_pictures:
            each_s = (written_s[-1] - written_s[0]) / (num_pictures - 1)
            signal.setitimer(signal.ITIMER_PROF, max(pictures_more * each_s, 1e-4))

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
        kill = partial(end_after, num_pictures, chance.uniform(0, PICTURES_MORE))
        process = processes.launch([*arguments, str(tmp_path / "killed")], log, before=kill)
        process.join()
        assert process.exitcode == -signal.SIGPROF, log.read_text()
        assert len(list((tmp_path / "killed").rglob("*.png"))) < NUM_PROMPTS
        assert not (tmp_path / "killed" / "metadata.jsonl").exists()
    main([*arguments, str(tmp_path / "killed")])
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
