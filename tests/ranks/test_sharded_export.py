"""`export` of what two ranks have saved together, in one process."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from srpo_lightning.cli import main
from tests.ranks.test_sharded import config, fit, whole


@pytest.fixture(scope="module")
def run(models, features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "run"
    fit(config(models, features, folder, 2), "--trainer.max_steps", "2")
    return folder


@pytest.mark.parametrize(("kind", "key"), [("policy", "state_dict"), ("ema", "ema")])
def test_a_sharded_checkpoint_is_exported_bit_for_bit(run, tmp_path, kind, key):
    """Against torch's own conversion to a file."""
    expected = whole(run, 2)[key]
    options = ["--dtype", "float32", "--weights", kind]
    main(["export", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "out"), *options])
    found = FluxTransformer2DModel.from_pretrained(tmp_path / "out").state_dict()
    assert len(found) == len(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name.removeprefix("policy.transformer.")], tensor)
