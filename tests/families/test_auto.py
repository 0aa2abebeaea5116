"""The family is told by the model's own configuration."""

import json
import re

import pytest

from srpo_lightning.config.arguments import new_policy, read_config
from srpo_lightning.policies import AutoPolicy, FluxPolicy, ZImagePolicy
from tests import tiny
from tests.families import tiny_krea2, tiny_z_image


@pytest.fixture(scope="module")
def z_image(tmp_path_factory):
    return str(tiny_z_image.write(tmp_path_factory.mktemp("z_image")))


def test_auto_is_the_models_own_family_with_all_settings(models, z_image, tmp_path):
    policies = [AutoPolicy(str(path), 48, width=32) for path in (models.pipeline, z_image, tiny_krea2.write(tmp_path))]
    assert [type(policy).__name__ for policy in policies] == ["FluxPolicy", "ZImagePolicy", "Krea2Policy"]
    assert {policy.size for policy in policies} == {(48, 32)}


def test_a_configuration_names_no_family(models, z_image, tmp_path, features):
    path = tiny.write_config(models, tmp_path / "run", features)
    settings = json.loads(path.read_text())
    settings["model"]["policy"]["class_path"] = "srpo_lightning.policies.AutoPolicy"
    path.write_text(json.dumps(settings))
    other = tmp_path / "family.json"
    other.write_text(json.dumps({"model": {"policy": {"init_args": {"pretrained": z_image}}}}))
    assert type(new_policy(read_config(str(path)))) is FluxPolicy
    assert type(new_policy(read_config(str(path), str(other)))) is ZImagePolicy


def test_another_familys_model_is_refused_by_the_name_of_the_class_that_fits(z_image):
    cure = "set model.policy.class_path to ZImagePolicy, or to AutoPolicy, which chooses by itself"
    with pytest.raises(ValueError, match=rf"transformer is a ZImageTransformer2DModel, and FluxPolicy .*: {cure}$"):
        FluxPolicy(z_image, 32, 32)


@pytest.mark.parametrize("policy", [AutoPolicy, FluxPolicy])
def test_a_model_of_no_family_is_refused(policy, tmp_path):
    folder = tmp_path / "unknown"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text('{"_class_name": "PixArtTransformer2DModel"}')
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    cure = "give a model for FluxPolicy, " if policy is AutoPolicy else "give a model of its family"
    with pytest.raises(ValueError, match=rf"PixArtTransformer2DModel, .*{re.escape(cure)}"):
        policy(str(folder), 32, 32)
