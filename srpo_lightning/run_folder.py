"""Where everything of a run lies, and how it is read: nobody else knows the names of its files."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from srpo_lightning.evaluation.comparison import BASE, read_table
from srpo_lightning.evaluation.metrics import Table
from srpo_lightning.files import records
from srpo_lightning.files.owners import PARTIAL, discard, is_left, run_lock
from srpo_lightning.files.records import Record


def step_name(step: int) -> str:
    """The name of what was made after so many optimizer steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The number of optimizer steps in the name of a file or folder; 0 where there is none."""
    found = re.search(r"step-(\d+)$", path.stem)
    return int(found[1]) if found else 0


def beside(strip: Path) -> Path:
    """The path of a clip whose strip of frames lies at another."""
    return strip.with_suffix(".webp")


class PictureFolder:
    """A folder of pictures by step, weights and index, with the records of all of them in one file.

    Args:
        path: Path of the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @staticmethod
    def name(step: int, weights: str, index: int) -> str:
        """The path of a picture in the folder."""
        return f"{step_name(step)}/{weights}/{index:05d}.png"

    def picture(self, step: int, weights: str, index: int) -> Path:
        """The picture of evaluation sample `index`, drawn by `weights` after `step` optimizer steps."""
        return self.path / self.name(step, weights, index)

    def clip(self, step: int, weights: str, index: int) -> Path:
        """The same sample moving, beside its strip of frames, where it is a clip."""
        return beside(self.picture(step, weights, index))

    @property
    def metadata(self) -> Path:
        """The records of the pictures, one a line."""
        return self.path / "metadata.jsonl"

    def pictures(self) -> list[Path]:
        """All pictures that are there, by their names."""
        return sorted(self.path.glob("step-*/*/*.png"))

    def remove_unfinished(self) -> None:
        """Remove pictures that a killed process was writing."""
        for left in filter(is_left, self.path.glob(f"step-*/*/*{PARTIAL}-*")):
            left.unlink()


class RunFolder:
    """The folder of a run, which a trainer knows as `default_root_dir`.

    Args:
        path: Path of the folder, which need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()  # as Lightning does with its own

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """The folder of a trainer's run."""
        return cls(trainer.default_root_dir)

    @classmethod
    def recording(cls, trainer: Trainer) -> Self:
        """Where a trainer's evaluations are recorded: the run's folder in `fit`, its `validation` otherwise.

        The run's own records choose its best checkpoint, make its report, and go on when it is resumed. `validate` and
        `test` may have other prompts and settings.
        """
        run = cls.of(trainer)
        return run if trainer.state.fn == TrainerFn.FITTING else run.validation

    @classmethod
    def of_config(cls, config: str | Path, default: str | Path) -> Self:
        """The folder of the run that wrote a configuration file, also after it was moved.

        Args:
            config: Path of a configuration file.
            default: Folder of the run where the file lies beside no checkpoints.
        """
        beside = cls(Path(config).expanduser().parent)
        return beside if beside._checkpoints.is_dir() else cls(default)

    @property
    def validation(self) -> Self:
        """What `validate` and `test` find, as a run folder of its own."""
        return type(self)(self.path / "validation")

    @property
    def trial(self) -> Self:
        """What a run of a few batches (trainer.fast_dev_run) writes, as a run folder of its own."""
        return type(self)(self.path / "fast_dev_run")

    def config(self, resumed: Path | None = None) -> Path:
        """The settings of the run; those of a run that was resumed from a checkpoint have a file of their own."""
        return self.path / (f"config-{resumed.stem}.yaml" if resumed else "config.yaml")

    def logged_id(self, service: str) -> Path:
        """The id of the run at a service that it logs to: wandb, mlflow or trackio."""
        return self.path / f"{service}_id"

    def configs(self) -> list[Path]:
        """The settings of every start of the run, the first one's first, then by the step that a start resumed from."""
        return [*self.path.glob("config.yaml"), *sorted(self.path.glob("config-step-*.yaml"))]

    @property
    def recipe(self) -> Path:
        """The configuration files that the run was started with, and all that they set."""
        return self.path / "recipe.json"

    @property
    def logs(self) -> Path:
        """The folder of TensorBoard's curves."""
        return self.path / "logs"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only process that trains here; what killed processes left unfinished is removed first.

        Raises:
            ValueError: if another process trains here, naming that and the cure.
        """
        with run_lock(self.path):
            self.remove_unfinished()
            yield

    def remove_unfinished(self) -> None:
        """Remove what killed processes were writing, and among the checkpoints all that is unfinished."""
        for left in [*self.path.rglob(f"*{PARTIAL}*"), *self._checkpoints.glob("*.deleted")]:
            if left.parent == self._checkpoints or is_left(left):
                discard(left)

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` optimizer steps: a file, or the folder of a sharded one."""
        return self._checkpoints / f"{step_name(step)}.ckpt"

    def checkpoints(self) -> list[Path]:
        """The whole checkpoints, oldest first."""
        return sorted(self._checkpoints.glob("step-*.ckpt"))

    def later_than(self, step: int) -> list[Path]:
        """The checkpoints of later steps, and the settings of starts that resumed from such."""
        named = [*self.checkpoints(), *self.configs()]
        return [path for path in named if step_of(path) > step]

    def set_aside(self, files: Iterable[Path]) -> Path:
        """Move checkpoints and settings where nothing looks for them; returns that folder, a new one."""
        number = 1
        while (folder := self._checkpoints / f"set_aside_{number}").exists():
            number += 1
        folder.mkdir(parents=True)
        for own in files:
            own.rename(folder / own.name)
        return folder

    def discard_checkpoints(self) -> None:
        """Delete all checkpoints, and keep what was recorded."""
        discard(self._checkpoints)

    def ranked_checkpoints(self, monitor: str, mode: str) -> list[Path]:
        """The checkpoints whose steps were evaluated, best first.

        Args:
            monitor: Number to be best in, `<weights>/<name>`, as RunCheckpoint has it.
            mode: Either max or min.
        """
        weights, _, name = monitor.partition("/")
        found = self.read_metrics()
        values = {r["step"]: float(r[name]) for r in found if r["weights"] == weights and name in r}
        scores = {path: values.get(step_of(path), math.nan) for path in self.checkpoints()}
        sign = -1 if mode == "max" else 1
        return sorted((path for path in scores if not math.isnan(scores[path])), key=lambda path: sign * scores[path])

    def find_checkpoint(self, ckpt_path: str, monitor: str | None, mode: str) -> Path:
        """What `--ckpt_path` means: `last`, `best` (in `monitor`), or a path.

        Raises:
            ValueError: naming the cure, if there is no such checkpoint. A run never starts anew where it was to resume.
        """
        if ckpt_path == "last":
            if found := self.checkpoints():
                return found[-1]
            raise ValueError(
                f"--ckpt_path last: no checkpoint in {self._checkpoints}. "
                "Point --trainer.default_root_dir at the run to resume, or leave --ckpt_path out to start anew"
            )
        if ckpt_path == "best":
            if not monitor:
                raise ValueError("--ckpt_path best needs checkpoint.monitor, the number to be best in: try ema/judge")
            if best := self.ranked_checkpoints(monitor, mode):
                return best[0]
            raise ValueError(f"--ckpt_path best: no checkpoint in {self.path} was evaluated in checkpoint.monitor")
        if not ckpt_path:
            raise ValueError("--ckpt_path is empty: it is `last`, `best`, or the path of a checkpoint")
        found_path = Path(ckpt_path).expanduser()
        if not found_path.exists():
            raise ValueError(f"--ckpt_path {ckpt_path} does not exist: `last` takes the newest of {self.path}")
        return found_path

    @property
    def metrics(self) -> Path:
        """The numbers of every evaluation, a line for each kind of weights."""
        return self.path / "metrics.jsonl"

    def append_metrics(self, record: Record) -> None:
        """Add a line to the numbers."""
        records.append(self.metrics, record)

    def read_metrics(self) -> list[Record]:
        """The numbers of every evaluation, oldest first; what is null in the file is NaN again."""
        lines = records.read(self.metrics)
        return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]

    def check_evaluated(self) -> None:
        """Refuse a folder that holds no numbers of evaluations.

        Raises:
            ValueError: naming it.
        """
        if not self.metrics.is_file():
            raise ValueError(
                f"{self.path} holds no evaluations ({self.metrics.name}): name a run's folder that has them"
            )

    @property
    def advice(self) -> Path:
        """What the guard said of evaluations, a line for each that it found something against."""
        return self.path / "guard.jsonl"

    @property
    def prompts(self) -> Path:
        """The evaluation prompts with their tags, in the order of their numbers in the tables."""
        return self.path / "tables" / "prompts.json"

    def read_prompts(self) -> list[str]:
        """The evaluation prompts by their number in the tables; none where an earlier version kept none.

        Raises:
            ValueError: if the file cannot be read.
        """
        if not self.prompts.is_file():
            return []
        try:
            return [str(record["prompt"]) for record in json.loads(self.prompts.read_text(encoding="utf-8"))]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.prompts} cannot be read: the next evaluation writes it anew") from error

    def table(self, step: int, weights: str) -> Path:
        """The numbers of every sample of `weights` after `step` optimizer steps."""
        return self.path / "tables" / step_name(step) / f"{weights}.safetensors"

    @property
    def base_table(self) -> Path:
        """The numbers of every sample of the base."""
        return self.path / "tables" / f"{BASE}.safetensors"

    def read_table(self, step: int, weights: str) -> Table | None:
        """The numbers of every sample of `weights`; None where there are none."""
        return read_table(self.table(step, weights))

    def read_base(self, key: str | None = None) -> Table | None:
        """The numbers of every sample of the base; None where there are none, or none under a key that is given."""
        return read_table(self.base_table, key)

    @property
    def samples(self) -> PictureFolder:
        """The pictures of the evaluations."""
        return PictureFolder(self.path / "samples")

    @property
    def predictions(self) -> PictureFolder:
        """The pictures that `predict` draws."""
        return PictureFolder(self.path / "predictions")

    def lora(self, step: int) -> Path:
        """The folder of the adapter after `step` optimizer steps."""
        return self.path / "lora" / step_name(step)

    @property
    def report(self) -> Path:
        """The table of base, policy and ema when training ends."""
        return self.path / "report.md"

    @property
    def page(self) -> Path:
        """The page about the run, written anew at every evaluation."""
        return self.path / "report.html"

    @property
    def sheet(self) -> Path:
        """The pictures of base, policy and ema when training ends."""
        return self.path / "before_after.png"

    @property
    def moving_sheet(self) -> Path:
        """The same of clips, moving."""
        return beside(self.sheet)

    def comparison(self, step: int) -> Path:
        """The comparison of all weights after `step` optimizer steps, without the suffix of its two files."""
        return self.path / step_name(step)
