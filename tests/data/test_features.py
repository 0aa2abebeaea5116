import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from srpo_lightning.data.features import FeatureCache
from srpo_lightning.policies.flux import FluxTextEncoder

PROMPTS = ["a cat", "b", "c d", "e"]


def encoder(folder, **settings) -> FluxTextEncoder:
    return FluxTextEncoder(str(folder), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_features_equal_fresh_ones_bit_for_bit(models, tmp_path, dtype):
    fresh = encoder(models.pipeline, dtype=dtype)
    cache = FeatureCache(str(tmp_path), fresh)
    assert cache.add(PROMPTS, batch_size=4) == 4
    for prompt, features in zip(PROMPTS, fresh.encode(PROMPTS), strict=True):
        assert cache[prompt].keys() == features.keys()
        for name, computed in features.items():
            assert cache[prompt][name].dtype == dtype
            assert torch.equal(cache[prompt][name], computed)


def test_a_prompt_is_computed_once_however_often_it_comes(models, tmp_path):
    cache = FeatureCache(str(tmp_path), encoder(models.pipeline))
    assert cache.add(["a", "b", "a"], batch_size=2) == 2
    assert cache.add(["b", "a"], batch_size=2) == 0


def test_a_full_cache_reads_no_weights(models, tmp_path, monkeypatch):
    FeatureCache(str(tmp_path), encoder(models.pipeline)).add(PROMPTS, 4)
    second = encoder(models.pipeline)
    monkeypatch.setattr(second, "_load", lambda: pytest.fail("the encoders were read"))
    assert FeatureCache(str(tmp_path), second).add(PROMPTS, 4) == 0


def test_a_prompt_that_is_not_there_is_refused_with_the_cure(models, tmp_path):
    cache = FeatureCache(str(tmp_path), encoder(models.pipeline))
    cache.add(["a"], 1)
    assert cache.missing(["a", "b", "b"]) == ["b"]
    with pytest.raises(ValueError, match=r"lacks the features of 'b': write it again with `python -m srpo_lightning"):
        cache["b"]


def test_the_size_before_compression_is_that_of_the_features(models, tmp_path):
    own = encoder(models.pipeline, dtype=torch.bfloat16)
    features = own.encode(["a"])[0]
    assert FeatureCache(str(tmp_path), own).item_bytes == sum(f.nbytes for f in features.values())


def test_other_weights_at_the_same_path_get_another_folder(models, tmp_path):
    folder = shutil.copytree(models.pipeline, tmp_path / "flux")
    before = FeatureCache(str(tmp_path / "cache"), encoder(folder))
    before.add(["a"], 1)
    weights = folder / "text_encoder" / "model.safetensors"
    save_file({name: t + 0.5 for name, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    after = FeatureCache(str(tmp_path / "cache"), encoder(folder))
    assert after.folder != before.folder
    assert after.add(["a"], 1) == 1
    assert not torch.equal(after["a"]["pooled_prompt_embeds"], before["a"]["pooled_prompt_embeds"])


def test_a_copied_model_folder_with_another_name_finds_the_same_features(models, tmp_path):
    FeatureCache(str(tmp_path / "cache"), encoder(models.pipeline)).add(PROMPTS, 4)
    copied = encoder(shutil.copytree(models.pipeline, tmp_path / "another"))
    cache = FeatureCache(str(tmp_path / "cache"), copied)
    cache.open()
    assert cache.missing(PROMPTS) == []
