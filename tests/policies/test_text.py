import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from srpo_lightning.policies import text_encoder
from srpo_lightning.policies.flux import FluxTextEncoder
from tests import tiny


def test_the_sequence_length_is_the_tokenizers_unless_given(models):
    assert FluxTextEncoder(str(models.pipeline)).max_sequence_length == tiny.MAX_TOKENS
    assert FluxTextEncoder(str(models.pipeline), 7).max_sequence_length == 7


@pytest.mark.parametrize(("prompt", "cut"), [("a" * (tiny.MAX_TOKENS - 2), False), ("a" * tiny.MAX_TOKENS, True)])
def test_a_prompt_is_truncated_where_its_tokens_exceed_the_length(models, prompt, cut):
    """One token for each letter, one for the start of the word and one for the end."""
    encoder = FluxTextEncoder(str(models.pipeline))
    assert (encoder.num_tokens([prompt])[0] > encoder.max_sequence_length) == cut


def test_unloading_and_encoding_again_gives_the_same_features(models):
    encoder = FluxTextEncoder(str(models.pipeline))
    first = encoder.encode(["a b"])[0]
    encoder.unload()
    again = encoder.encode(["a b"])[0]
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_features_come_in_the_dtype_asked_for(models):
    features = FluxTextEncoder(str(models.pipeline), dtype=torch.bfloat16).encode(["a"])[0]
    assert [f.dtype for f in features.values()] == [torch.bfloat16, torch.bfloat16]


def test_the_fingerprint_follows_whatever_the_features_depend_on(models, tmp_path):
    """Weights, tokenizers, length and dtype; not the transformer, and not where the folder lies."""
    original = FluxTextEncoder(str(models.pipeline)).fingerprint()
    assert FluxTextEncoder(str(models.pipeline), 7).fingerprint() != original
    assert FluxTextEncoder(str(models.pipeline), dtype=torch.bfloat16).fingerprint() != original
    folder = shutil.copytree(models.pipeline, tmp_path / "flux")
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "text_encoder" / ".ipynb_checkpoints").mkdir()
    assert FluxTextEncoder(str(folder)).fingerprint() == original
    weights = folder / "text_encoder_2" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: t + 1 for name, t in tensors.items()}, weights, metadata={"format": "pt"})
    retrained = FluxTextEncoder(str(folder)).fingerprint()
    assert retrained != original
    with (folder / "tokenizer_2" / "tokenizer.json").open("a") as stream:
        stream.write("\n")
    assert FluxTextEncoder(str(folder)).fingerprint() not in (original, retrained)


def test_a_folder_without_text_encoders_is_refused_with_the_cure(tmp_path):
    with pytest.raises(ValueError, match=r"text_encoder_2/config.json is missing.*a whole model folder"):
        FluxTextEncoder(str(tmp_path))


def test_the_description_says_what_the_fingerprint_follows(models):
    encoder = FluxTextEncoder(str(models.pipeline), 7, torch.bfloat16, quantize="nf4")
    told = encoder.description()
    assert told["fingerprint"] == encoder.fingerprint()
    assert {name: told[name] for name in ("model", "revision", "sequence_length", "dtype", "quantize")} == {
        "model": "flux", "revision": "local", "sequence_length": 7, "dtype": "bfloat16", "quantize": "nf4",
    }  # fmt: skip
    assert FluxTextEncoder(str(models.pipeline), 7, torch.bfloat16).fingerprint() != encoder.fingerprint()


@pytest.mark.parametrize(("quantize", "tolerance"), [("int8", 0.02), ("nf4", 0.4)])
def test_a_quantized_encoder_gives_nearly_the_same_features(models, quantize, tolerance):
    """The norm of the difference next to that of the features; CLIP stays as it is."""
    whole = FluxTextEncoder(str(models.pipeline), dtype=torch.bfloat16).encode(["a b", "c"])
    small = FluxTextEncoder(str(models.pipeline), dtype=torch.bfloat16, quantize=quantize).encode(["a b", "c"])
    for expected, found in zip(whole, small, strict=True):
        difference = (found["prompt_embeds"].float() - expected["prompt_embeds"].float()).norm()
        assert 0 < difference / expected["prompt_embeds"].float().norm() < tolerance
        assert torch.equal(found["pooled_prompt_embeds"], expected["pooled_prompt_embeds"])


def test_layers_in_8_bits_are_made_where_they_compute(models, monkeypatch):
    """Moved later they would leave the numbers that they compute with behind; the meta device stands in for a GPU."""
    places = []
    monkeypatch.setattr(text_encoder, "check_device", lambda *_: None)
    monkeypatch.setattr(text_encoder, "keep_in_8_bits", lambda _, device: places.append(device))
    FluxTextEncoder(str(models.pipeline), device="meta", quantize="int8")._load()
    assert places == ["meta"]
