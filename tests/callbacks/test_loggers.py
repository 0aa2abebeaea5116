"""What reaches loggers beside numbers: the whole configuration; and that a resumed run goes on in the same place."""

import json
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
import yaml
from jsonargparse import Namespace
from mlflow.tracking import MlflowClient
from PIL import Image

from srpo_lightning.callbacks.samples import LEGIBLE_PX
from srpo_lightning.cli import main
from srpo_lightning.config.loggers import forget_own, go_on_in_the_same
from srpo_lightning.loggers import TrackioLogger
from srpo_lightning.run_folder import RunFolder
from tests import tiny


@pytest.fixture
def config(models, features, tmp_path):
    """Writes a configuration with loggers and callbacks that log."""

    def written(*loggers: dict) -> str:
        settings = tiny.config(models, tmp_path / "run", features)
        settings["trainer"] |= {"logger": list(loggers) or True, "max_steps": 2}
        (tmp_path / "run.yaml").write_text(json.dumps(settings))
        return str(tmp_path / "run.yaml")

    return written


def test_tensorboard_has_the_whole_configuration_without_being_told(config, tmp_path):
    main(["fit", "--config", config()])
    told = yaml.safe_load((RunFolder(tmp_path / "run").logs / "hparams.yaml").read_text())
    assert told["model.objective.init_args.num_rollout_steps"] == 2
    assert told["model.policy.init_args.height"] == 32
    assert (told["trainer.gradient_clip_val"], told["trainer.max_steps"]) == (0.1, 2)
    assert told["checkpoint.every_n_steps"] == 2


def test_every_logger_gets_it(config, tmp_path):
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "csv"}}
    main(["fit", "--config", config(csv)])
    told = yaml.safe_load((tmp_path / "csv" / "version_0" / "hparams.yaml").read_text())
    assert told["model.policy.init_args.height"] == 32


def wandb_settings(**init_args) -> Namespace:
    return Namespace(class_path="lightning.pytorch.loggers.WandbLogger", init_args=Namespace(**init_args))


def test_a_resumed_run_has_the_id_of_its_beginning_and_a_new_one_another(tmp_path):
    def id_of(*, is_resumed: bool) -> str:
        logger = wandb_settings(id=None, version=None)
        go_on_in_the_same([logger], RunFolder(tmp_path), is_resumed=is_resumed)
        assert logger.init_args.resume == "allow"
        return logger.init_args.id

    first = id_of(is_resumed=False)
    assert id_of(is_resumed=True) == first
    assert id_of(is_resumed=False) != first
    own, other = wandb_settings(id="mine", version=None), RunFolder(tmp_path / "other")
    go_on_in_the_same(own, other, is_resumed=False)
    assert own.init_args.id == "mine"
    go_on_in_the_same(True, other, is_resumed=False)
    assert not other.path.exists()


def test_weights_and_biases_offline_gets_settings_and_pictures_and_goes_on(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"save_dir": str(tmp_path), "offline": True, "project": "tiny"},
    }
    path = config(logger)
    main(["fit", "--config", path, "--trainer.max_steps", "1"])
    wandb.finish()
    main(["fit", "--config", path, "--ckpt_path", "last"])
    wandb.finish()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    (name,) = {folder.name.rpartition("-")[2] for folder in runs}
    assert name == RunFolder(tmp_path / "run").logged_id("wandb").read_text()
    for kept in RunFolder(tmp_path / "run").configs():  # from which another run may be made
        (own,) = yaml.safe_load(kept.read_text())["trainer"]["logger"]
        assert own["init_args"]["id"] is None
        assert "resume" not in own["init_args"]
    assert any(folder.rglob("media/images/*") for folder in runs)
    (written, *_) = runs[0].glob("run-*.wandb")
    content = written.read_bytes()
    assert b"model.policy.init_args.height" in content


def fit_and_resume(path: str) -> None:
    """A run of one step, and its second step with another learning rate."""
    main(["fit", "--config", path, "--trainer.max_steps", "1"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* when the checkpoint was written, and is")  # as it should
        main(["fit", "--config", path, "--ckpt_path", "last", "--model.optimizer.init_args.lr", "2e-3"])


def assert_sheets(folder: Path, count: int) -> None:
    """A folder has that many sheets of samples, wide enough for the prompts that stand over the pictures."""
    pictures = sorted(path for path in folder.rglob("*.png") if "compressed" not in path.name)
    assert len(pictures) == count
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width >= LEGIBLE_PX


@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")  # mlflow 3.17 on SQLAlchemy 2.1
def test_mlflow_gets_settings_and_pictures_and_a_resumed_run_goes_on_though_its_parameters_cannot_change(
    config, tmp_path
):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    logger = {
        "class_path": "lightning.pytorch.loggers.MLFlowLogger",
        "init_args": {"tracking_uri": store, "artifact_location": f"file://{tmp_path}/artifacts"},
    }
    fit_and_resume(config(logger))
    client = MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string="name = 'lightning_logs'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert json.loads(RunFolder(tmp_path / "run").logged_id("mlflow").read_text())["id"] == run.info.run_id
    assert run.info.status == "FINISHED"
    lr = "model.optimizer.init_args.lr"
    assert (run.data.params[lr], run.data.params["model.policy.init_args.height"]) == ("0.001", "32")
    logged = tmp_path / "artifacts" / run.info.run_id / "artifacts"
    told = [json.loads((logged / f"{name}.json").read_text())[lr] for name in ("config", "config-step-00000001")]
    assert told == [0.001, 0.002]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [0, 1]
    assert_sheets(logged / "images", 2)


def test_another_run_made_from_the_record_of_one_goes_on_in_none(tmp_path):
    run = RunFolder(tmp_path)
    run.logged_id("mlflow").write_text(json.dumps({"store": "file:here", "id": "1"}))
    settings = {
        "WandbLogger": {"id": None},
        "TrackioLogger": {"name": None, "resume": "never"},
        "MLFlowLogger": {"run_id": None, "tracking_uri": None, "save_dir": "here"},
    }
    loggers = [Namespace(class_path=name, init_args=Namespace(**own)) for name, own in settings.items()]
    go_on_in_the_same(loggers, run, is_resumed=True)
    assert all(next(iter(vars(own.init_args).values())) for own in loggers)
    forget_own(loggers, run)
    assert [vars(own.init_args) for own in loggers] == list(settings.values())
    named = Namespace(class_path="TrackioLogger", init_args=Namespace(name="mine", resume="allow"))
    forget_own(named, run)
    assert named.init_args.name == "mine"


def test_the_id_of_a_run_in_one_store_of_mlflow_is_not_given_to_another(tmp_path):
    run = RunFolder(tmp_path)
    run.logged_id("mlflow").write_text(json.dumps({"store": "file:here", "id": "1"}))

    def id_in(*, is_resumed: bool = True, **init_args) -> str | None:
        own = Namespace(class_path="MLFlowLogger", init_args=Namespace(**init_args))
        go_on_in_the_same(own, run, is_resumed=is_resumed)
        return own.init_args.get("run_id")

    assert id_in(tracking_uri=None, save_dir="here") == "1"
    assert id_in(tracking_uri="http://there", save_dir="here") is None
    assert id_in(tracking_uri=None, save_dir="here", is_resumed=False) is None
    assert id_in(tracking_uri=None, save_dir="here", run_id="mine") == "mine"


TRACKIO = {"class_path": "srpo_lightning.loggers.TrackioLogger", "init_args": {"project": "tiny"}}


def test_trackio_gets_settings_and_pictures_and_a_resumed_run_goes_on(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    fit_and_resume(config(TRACKIO))
    trackio = import_module("trackio")
    (run,) = trackio.Api().runs("tiny")
    assert run.name == RunFolder(tmp_path / "run").logged_id("trackio").read_text()
    assert run.name.startswith("run-")
    assert run.config["model.policy.init_args.height"] == 32
    logs = import_module("trackio.sqlite_storage").SQLiteStorage.get_logs("tiny", run.name)
    losses = [row for row in logs if "train/loss" in row]
    assert [row["step"] for row in losses] == [0, 1]
    assert_sheets(tmp_path / "trackio" / "media", 2)


def test_trackio_not_installed_is_said_with_the_cure(monkeypatch):
    monkeypatch.setattr("srpo_lightning.loggers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"TrackioLogger needs trackio: pip install 'srpo-lightning\[trackio\]'"):
        TrackioLogger()


def test_what_is_told_of_a_run_of_trackio_that_has_begun_is_added(monkeypatch):
    logger = TrackioLogger()
    logger._run = SimpleNamespace(config={"a": 1}, finish=lambda: None)
    logger.log_hyperparams({"b": 2})
    assert logger._run.config == {"a": 1, "b": 2}
    logger.finalize("success")
    assert logger._run is None
