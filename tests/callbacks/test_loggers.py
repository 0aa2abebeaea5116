"""What reaches loggers beside numbers: the whole configuration; and that a resumed run goes on in the same place."""

import json

import pytest
import wandb
import yaml
from jsonargparse import Namespace

from srpo_lightning.cli import main
from srpo_lightning.config.loggers import go_on_in_the_same
from srpo_lightning.run_folder import RunFolder
from tests import tiny


@pytest.fixture
def config(models, features, tmp_path):
    """Writes a configuration with loggers."""

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
        go_on_in_the_same([logger], tmp_path / "id", is_resumed=is_resumed)
        assert logger.init_args.resume == "allow"
        return logger.init_args.id

    first = id_of(is_resumed=False)
    assert id_of(is_resumed=True) == first
    assert id_of(is_resumed=False) != first
    own = wandb_settings(id="mine", version=None)
    go_on_in_the_same(own, tmp_path / "other", is_resumed=False)
    assert own.init_args.id == "mine"
    go_on_in_the_same(True, tmp_path / "other", is_resumed=False)
    assert not (tmp_path / "other").exists()


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
    assert name == RunFolder(tmp_path / "run").wandb_id.read_text()
    for kept in RunFolder(tmp_path / "run").configs():  # from which another run may be made
        (own,) = yaml.safe_load(kept.read_text())["trainer"]["logger"]
        assert own["init_args"]["id"] is None
        assert "resume" not in own["init_args"]
    assert any(folder.rglob("media/images/*") for folder in runs)
    (written, *_) = runs[0].glob("run-*.wandb")
    content = written.read_bytes()
    assert b"model.policy.init_args.height" in content
