"""What `fit` says about memory before it reads weights, with a machine that pretends to have little."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from srpo_lightning.cli import main
from srpo_lightning.config.arguments import read_config
from srpo_lightning.jobs.estimate import room
from srpo_lightning.policies import FluxPolicy
from tests import tiny


@pytest.fixture
def config(models, features, tmp_path) -> str:
    return str(tiny.write_config(models, tmp_path / "run", features))


def check(config: str, devices: int = 1) -> None:
    settings = read_config(config)
    trainer = tiny.new_trainer(settings.trainer.default_root_dir)
    trainer.strategy.parallel_devices = [torch.device("cpu")] * devices
    room.check_room(settings, trainer)


@pytest.fixture
def predict(monkeypatch):
    """Sets what is found instead of a prediction, in this process."""

    def use(memory: int, prediction: Callable[..., int]) -> None:
        monkeypatch.setattr(room, "memory_per_rank", lambda devices: memory)
        monkeypatch.setattr(room, "predicted_peaks", prediction)
        monkeypatch.setattr(room, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))

    return use


def test_a_run_that_cannot_fit_is_refused_before_weights_are_read(config, tmp_path, monkeypatch):
    """The real prediction, in its own process; the tiny model does not fit a megabyte."""
    monkeypatch.setattr(room, "memory_per_rank", lambda devices: 1_000_000)
    monkeypatch.setattr(FluxPolicy, "load", lambda *_: pytest.fail("weights were read"))
    cure = r"predicted peak .* GiB are there.*srpo_lightning estimate --config.*\.dtype bfloat16.*memory_check false"
    with pytest.raises(SystemExit, match=cure):
        main(["fit", "--config", config])
    assert not (tmp_path / "run").exists()


def test_without_the_check_it_is_tried_all_the_same(config, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "memory_per_rank", lambda devices: 1_000_000)
    main(["fit", "--config", config, "--memory_check", "false", "--trainer.max_steps", "1"])
    assert list(tmp_path.rglob("*.ckpt"))


def test_judges_count_which_are_there_while_they_evaluate(config, predict):
    """Of clips and large judges an evaluation has the highest peak."""
    seen = []
    predict(2_000_000, lambda settings, *_: seen.append(settings) or (1_000_000, 0))
    check(config)
    assert any(own.class_path.endswith(".RewardTracking") for own in seen[0].trainer.callbacks)


def test_a_judge_that_cannot_be_predicted_is_left_out(config, predict):
    def of_training(settings, *_):
        if any(own.class_path.endswith(".RewardTracking") for own in settings.trainer.callbacks):
            raise NotImplementedError("a judge of one's own")
        return 2_000_000, 0

    predict(1_000_000, of_training)
    with pytest.raises(ValueError, match="predicted peak"):
        check(config)


@pytest.mark.parametrize(
    ("memory", "said"), [(800_000, ValueError), (950_000, UserWarning), (1_050_000, UserWarning), (1_200_000, None)]
)
def test_only_what_is_certain_is_refused_and_what_is_close_is_said(config, predict, memory, said):
    predict(memory, lambda *_: (1_000_000, 0))
    if said is ValueError:
        with pytest.raises(ValueError, match="predicted peak"):
            check(config)
    elif said:
        with pytest.warns(said, match="is close"):
            check(config)
    else:
        check(config)


def test_a_prediction_that_fails_lets_the_run_pass(config, predict):
    def impossible(*_):
        raise NotImplementedError("a reward of one's own")

    predict(1_000_000, impossible)
    with pytest.warns(UserWarning, match="could not be predicted .*a reward of one's own"):
        check(config)


def test_what_the_machine_cannot_hold_beside_its_devices_is_refused(config, predict, monkeypatch):
    predict(2_000_000, lambda *_: (1_000_000, 90 << 30))
    cure = r"90.0 GiB of the machine's own memory, where 64.0 GiB are there: .* quantize nf4.* memory_check false"
    settings, trainer = read_config(config), tiny.new_trainer("run")
    trainer.strategy.parallel_devices = [torch.device("cuda", 0)]
    monkeypatch.setattr(room, "machine_memory", lambda: 64 << 30)
    with pytest.raises(ValueError, match=cure):
        room.check_room(settings, trainer)
    monkeypatch.setattr(room, "machine_memory", lambda: 96 << 30)
    room.check_room(settings, trainer)


def test_a_small_model_is_not_predicted(config, monkeypatch):
    monkeypatch.setattr(room, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("predicted"))
    check(config)


def test_a_model_whose_files_are_not_here_counts_as_large(config):
    settings = read_config(config)
    assert room.is_small(settings, 1 << 40)
    settings["model.policy.init_args.pretrained"] = "black-forest-labs/FLUX.1-dev"
    assert not room.is_small(settings, 1 << 40)


@pytest.mark.parametrize("devices", [1, 2])
def test_ranks_on_a_cpu_share_the_memory_of_the_machine(devices):
    whole = room.memory_per_rank([torch.device("cpu")])
    assert room.memory_per_rank([torch.device("cpu")] * devices) == whole // devices
    assert 1 << 30 < whole < 1 << 45


def test_cuda_devices_count_by_the_smallest(monkeypatch):
    sizes = {0: 80 << 30, 1: 24 << 30}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: type("Properties", (), {"total_memory": sizes[d.index]})
    )
    assert room.memory_per_rank([torch.device("cuda", 0), torch.device("cuda", 1)]) == 24 << 30
    assert room.memory_per_rank([torch.device("mps")]) is None
