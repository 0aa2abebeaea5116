"""What Krea 2 alone has: Turbo's schedule, layers that the pipeline names, norms that stay in float32."""

import json

import diffusers
import pytest
import torch

from srpo_lightning.encoding import Encoding
from srpo_lightning.policies import Krea2Policy, Lora
from tests.families import tiny_krea2


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_krea2.write(tmp_path_factory.mktemp("krea2"))


def change_index(folder, **values):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_distilled_model_has_one_shift_for_all_sizes(tmp_path):
    """Krea2Pipeline hands the scheduler mu = 1.15."""
    tiny_krea2.write(tmp_path, is_distilled=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)
    for size in ((32, 32), (256, 128)):
        ours = Krea2Policy(str(tmp_path), *size).sigmas(4)
        torch.testing.assert_close(ours.float(), scheduler.sigmas, rtol=0, atol=1e-6)


def test_features_depend_on_the_layers_that_the_pipeline_names(tmp_path):
    tiny_krea2.write(tmp_path)
    encoder = Krea2Policy(str(tmp_path), 32, 32).encoder(Encoding()).text
    (before,), fingerprint = encoder.encode(["a cat"]), encoder.fingerprint()
    change_index(tmp_path, text_encoder_select_layers=[1, 3, 4])
    (after,) = encoder.encode(["a cat"])
    same = [
        torch.equal(a, b) for a, b in zip(*(own["prompt_embeds"].unbind(1) for own in (before, after)), strict=True)
    ]
    assert same == [True, False, True]
    assert encoder.fingerprint() != fingerprint


def test_tokens_are_counted_as_they_are_cut(pipeline):
    encoder = Krea2Policy(str(pipeline), 32, 32).encoder(Encoding()).text
    prompts = ["", "a cat", "x" * 19, "x" * 20]
    assert encoder.num_tokens(prompts)[2:] == [24, 25]
    rows = [len(own["prompt_embeds"]) for own in encoder.encode(prompts)]
    assert rows == [min(number, encoder.max_sequence_length) for number in encoder.num_tokens(prompts)]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_norms_stay_in_float32_beside_weights_in_bfloat16(pipeline, is_streamed):
    """As `from_pretrained` of diffusers leaves them."""
    policy = Krea2Policy(str(pipeline), 32, 32, dtype="bfloat16", adapter=Lora(rank=2))
    policy.load((lambda model, blocks: model.to_empty(device="cpu")) if is_streamed else None)
    theirs = diffusers.Krea2Transformer2DModel.from_pretrained(
        pipeline, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    found = {name.replace(".base_layer", ""): p.dtype for name, p in policy.transformer.named_parameters()}
    assert {torch.float32, torch.bfloat16} == {p.dtype for p in theirs.parameters()}
    assert all(found[name] == p.dtype for name, p in theirs.named_parameters())


def test_trained_weights_of_two_dtypes_are_not_divided(pipeline):
    policy = Krea2Policy(str(pipeline), 32, 32, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"dtype is bfloat16, of which .* set model.policy.init_args.dtype to float32"):
        policy.load(lambda model, blocks: None)


def test_kernels_that_take_no_mask_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"'_native_flash', which is .*, takes the masks .*: choose from native, "):
        Krea2Policy(str(pipeline), 32, 32, attention="_native_flash")


def test_a_blocks_modulation_is_one_row_in_a_single_file(pipeline):
    """As the file was published; diffusers' converter would read several rows too."""
    names = Krea2Policy.single_file
    own = {name: p.shape for name, p in Krea2Policy(str(pipeline), 32, 32).empty_transformer().named_parameters()}
    parts = names.sources(own)
    shapes = {name: names.shape(name, [tuple(own[part]) for part in parts[name]]) for name in parts}
    assert shapes["blocks.0.mod.lin"] == (6 * 16,)
    assert shapes["last.modulation.lin"] == (2, 16)
    joined = names.joined("blocks.0.mod.lin", [torch.zeros(own["transformer_blocks.0.scale_shift_table"])])
    assert joined.shape == shapes["blocks.0.mod.lin"]
