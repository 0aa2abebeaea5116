"""What Lightning's loggers lack: trackio, and a whole configuration and pictures for each of them alike."""

import json
from argparse import Namespace
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from srpo_lightning.files.checkpoints import complete_or_absent

LONGEST, MOST_AT_ONCE = 500, 100
"""Letters of a parameter in MLflow's older stores, and parameters of one call."""


class TrackioLogger(Logger):
    """Logs into trackio: runs are kept in a folder of this machine, or in a Space of the Hugging Face Hub.

    The folder is the one that the environment variable TRACKIO_DIR names; `trackio show` opens its pages. It needs
    `pip install 'srpo-lightning[trackio]'`.

    Args:
        project: Name of the project that the run belongs to.
        name: Name of the run; null takes the run folder's with a random ending, and a resumed run goes on in it.
        space_id: Space of the Hugging Face Hub to log to, OWNER/NAME; null keeps the run on this machine.
        server_url: Address of a trackio server of your own, with its write token; null for none.
        group: Name that runs which belong together share; null for none.
        resume: Whether a run of this name goes on where there is one (allow), has to be there (must), or is begun
            anew beside it (never).

    Raises:
        ValueError: if trackio is not installed.
    """

    def __init__(
        self,
        project: str = "srpo-lightning",
        name: str | None = None,
        space_id: str | None = None,
        server_url: str | None = None,
        group: str | None = None,
        resume: Literal["allow", "must", "never"] = "never",
    ) -> None:
        super().__init__()
        if find_spec("trackio") is None:
            raise ValueError("TrackioLogger needs trackio: pip install 'srpo-lightning[trackio]'")
        self._settings = {"project": project, "space_id": space_id, "server_url": server_url, "group": group}
        self._name, self._resume = name, resume
        self._config: dict[str, Any] = {}
        self._run: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of trackio, which begins when it is first asked for."""
        import trackio  # takes seconds

        if self._run is None:
            self._run = trackio.init(
                **self._settings, name=self._name, resume=self._resume, config=dict(self._config), embed=False
            )
            self._name, self._resume = self._run.name, "allow"
        return self._run

    @property
    def name(self) -> str:
        """The name of the project."""
        return str(self._settings["project"])

    @property
    def version(self) -> str | None:
        """The name of the run; None until it has begun, unless it was given."""
        return self._name

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Tell the run its configuration, which reaches trackio with the first numbers."""
        told = vars(params) if isinstance(params, Namespace) else params
        self._config |= told
        if self._run is not None:
            self._run.config.update(told)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers of a step."""
        self.experiment.log(dict(metrics), step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Image.Image], step: int | None = None, caption: str = "") -> None:
        """Log pictures of a step under one name, as Lightning's logger of Weights & Biases does."""
        import trackio

        for number, image in enumerate(images):
            name = key if len(images) == 1 else f"{key}/{number}"
            self.experiment.log({name: trackio.Image(image, caption=caption or None)}, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what waits to be written; what is logged later goes on in the same run."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def log_configuration(logger: Logger, settings: dict[str, Any], name: str) -> None:
    """Log the whole configuration of a start.

    Parameters of a run of MLflow never change, and are short. So there the configuration is an artifact of each start
    besides, and of a resumed run only new names are logged as parameters.

    Args:
        logger: Logger of any kind; called on the first rank.
        settings: Plain values by dotted name.
        name: Name of the artifact without its ending.
    """
    if not isinstance(logger, MLFlowLogger):
        logger.log_hyperparams(settings)
        return
    from mlflow.entities import Param  # an extra, which is there where its logger is

    client, run_id = logger.experiment, logger.run_id
    known = client.get_run(run_id).data.params
    client.update_run(run_id, status="RUNNING")
    client.log_dict(run_id, settings, f"{name}.json")
    new = [Param(name, str(value)[:LONGEST]) for name, value in settings.items() if name not in known]
    for start in range(0, len(new), MOST_AT_ONCE):
        client.log_batch(run_id, params=new[start : start + MOST_AT_ONCE])


def keep_id(logger: Logger, file: Path) -> None:
    """Keep the id that MLflow has given to a run, by which a resumed run goes on in it; other services take ours.

    Args:
        logger: Logger of any kind; called on the first rank.
        file: File for the id and the store that it is of.
    """
    if isinstance(logger, MLFlowLogger):
        with complete_or_absent(file) as partial:
            partial.write_text(
                json.dumps({"store": logger.experiment.tracking_uri, "id": logger.run_id}), encoding="utf-8"
            )


def show(logger: Logger, sheet: Image.Image, step: int) -> None:
    """Log a sheet of samples, which has the prompts in it, where the logger takes pictures."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image("samples", np.array(sheet), step, dataformats="HWC")
    elif isinstance(logger, WandbLogger | TrackioLogger):
        logger.log_image("samples", [sheet], step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, sheet, key="samples", step=step)
