import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from srpo_lightning.data.features import FeatureCache
from srpo_lightning.policies.text import FluxTextEncoder

PROMPTS = ["a cat", "b", "c d", "e"]


def encoder(folder) -> FluxTextEncoder:
    return FluxTextEncoder(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_features_equal_fresh_ones_bit_for_bit(models, tmp_path, dtype):
    fresh = FluxTextEncoder(str(models.pipeline), dtype=dtype)
    cache = FeatureCache(tmp_path, fresh)
    assert cache.fill(PROMPTS, batch_size=4) == 4
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors"}
    for prompt, features in zip(PROMPTS, fresh.encode(PROMPTS), strict=True):
        for cached, computed in zip(cache[prompt], features, strict=True):
            assert cached.dtype == dtype
            assert torch.equal(cached, computed)


def test_a_prompt_is_computed_once_however_often_it_comes(models, tmp_path):
    cache = FeatureCache(tmp_path, encoder(models.pipeline))
    assert cache.fill(["a", "b", "a"], batch_size=2) == 2
    assert cache.fill(["b", "a"], batch_size=2) == 0


def test_a_full_cache_reads_no_weights(models, tmp_path, monkeypatch):
    FeatureCache(tmp_path, encoder(models.pipeline)).fill(PROMPTS, 4)
    second = encoder(models.pipeline)
    monkeypatch.setattr(second, "_load", lambda: pytest.fail("the encoders were read"))
    assert FeatureCache(tmp_path, second).fill(PROMPTS, 4) == 0


def test_an_interrupted_fill_goes_on_where_it_stopped(models, tmp_path, monkeypatch):
    first = encoder(models.pipeline)
    encode, batches = first.encode, []

    def stop_at_the_second_batch(prompts):
        batches.append(prompts)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return encode(prompts)

    monkeypatch.setattr(first, "encode", stop_at_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path, first).fill(PROMPTS, 2)
    cache = FeatureCache(tmp_path, encoder(models.pipeline))
    assert cache.fill(PROMPTS, 2) == 2
    assert all(cache[prompt].prompt_embeds.isfinite().all() for prompt in PROMPTS)


def test_a_half_written_file_does_not_count_as_features(models, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, encoder(models.pipeline))

    def stop_half_way(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("srpo_lightning.data.features.save_file", stop_half_way)
        with pytest.raises(KeyboardInterrupt):
            cache.fill(["a"], 1)
    assert cache.fill(["a"], 1) == 1
    assert cache["a"].prompt_embeds.isfinite().all()


def test_other_weights_at_the_same_path_get_another_folder(models, tmp_path):
    folder = shutil.copytree(models.pipeline, tmp_path / "flux")
    before = FeatureCache(tmp_path / "cache", encoder(folder))
    before.fill(["a"], 1)
    weights = folder / "text_encoder" / "model.safetensors"
    save_file({name: t + 0.5 for name, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    after = FeatureCache(tmp_path / "cache", encoder(folder))
    assert after.folder != before.folder
    assert after.fill(["a"], 1) == 1
    assert not torch.equal(after["a"].pooled_prompt_embeds, before["a"].pooled_prompt_embeds)
