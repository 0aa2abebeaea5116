"""Published geometries, by which memory is predicted without any file of theirs."""

import math

import pytest

from srpo_lightning.jobs.estimate.prediction import without_weights
from srpo_lightning.jobs.estimate.published import small_files, write_small_files
from srpo_lightning.policies import AutoPolicy
from srpo_lightning.policies.family import families
from srpo_lightning.policies.flux import FluxTextEncoder

BILLIONS = {
    "black-forest-labs/FLUX.1-dev": 11.90,
    "black-forest-labs/FLUX.1-Krea-dev": 11.90,
    "black-forest-labs/FLUX.2-klein-base-4B": 3.88,
    "black-forest-labs/FLUX.2-klein-base-9B": 9.08,
    "black-forest-labs/FLUX.2-dev": 32.22,
    "krea/Krea-2-Raw": 12.82,
    "Qwen/Qwen-Image": 20.43,
    "Qwen/Qwen-Image-2512": 20.43,
    "lodestones/Chroma1-HD": 8.90,
    "stabilityai/stable-diffusion-3.5-large": 8.06,
    "stabilityai/stable-diffusion-3.5-medium": 2.24,
    "Tongyi-MAI/Z-Image": 6.16,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1.42,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14.29,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 5.00,
}
"""Parameters of the transformer, as its publisher says or counted from its published configuration."""


def test_every_family_of_the_package_has_published_models():
    own = [family for family in families() if family.__module__.startswith("srpo_lightning.")]
    assert {name for family in own for name in family.published} == BILLIONS.keys()
    assert all(family.published for family in own)


@pytest.mark.parametrize("name", BILLIONS)
def test_a_published_geometry_has_the_published_number_of_weights(name, tmp_path):
    folder = write_small_files(name, small_files(name), tmp_path)
    policy = AutoPolicy(str(folder), 1024, 1024)
    with without_weights():
        policy.load()
    found = sum(math.prod(p.shape) for p in policy.transformer.parameters())
    assert found / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)


def test_features_of_one_text_encoder_read_in_two_ways_are_kept_apart(tmp_path, models):
    """Z-Image and FLUX.2 klein have the same encoder and tokenizer, and take other layers of it."""

    class Otherwise(FluxTextEncoder):
        version = 2

    kinds = (FluxTextEncoder, Otherwise, type("Another", (FluxTextEncoder,), {}))
    assert len({kind(str(models.pipeline)).fingerprint() for kind in kinds}) == 3
