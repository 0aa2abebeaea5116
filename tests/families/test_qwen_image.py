"""What Qwen-Image alone has: a text branch that ends unread, a stretched schedule, a level that autocast rounds."""

import json

import diffusers
import pytest
import torch

from srpo_lightning import flow
from srpo_lightning.batch import Conditions, Text
from srpo_lightning.draws import sample_noise
from srpo_lightning.encoding import Encoding
from srpo_lightning.policies import Lora, QwenImagePolicy
from tests.families import tiny_qwen_image


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return str(tiny_qwen_image.write(tmp_path_factory.mktemp("qwen")))


def test_what_the_last_block_makes_of_the_text_is_not_trained(pipeline):
    policy = QwenImagePolicy(pipeline, 32, 32)
    policy.load()
    frozen = {name for name, p in policy.transformer.named_parameters() if not p.requires_grad}
    last = ("transformer_blocks.1.attn.to_add_out.", "transformer_blocks.1.txt_mlp.")
    assert len(frozen) == 6
    assert all(name.startswith(last) for name in frozen)
    outline = {name for name, p in policy.outline().named_parameters() if not p.requires_grad}
    assert outline == frozen


@pytest.mark.parametrize("targets", [None, ["to_add_out", "to_q"]])
def test_no_adapter_goes_there(pipeline, targets):
    policy = QwenImagePolicy(pipeline, 32, 32, adapter=Lora(rank=2, target_modules=targets))
    policy.load()
    trained = {name for name, p in policy.transformer.named_parameters() if p.requires_grad}
    assert any(".0.attn.to_add_out." in name for name in trained)
    assert not any(".1.attn.to_add_out." in name or ".1.txt_mlp." in name for name in trained)


@pytest.mark.parametrize("num_steps", [4, 50])
def test_the_last_level_above_zero_is_the_schedulers_terminal_one(pipeline, num_steps):
    policy = QwenImagePolicy(pipeline, 48, 32)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline, subfolder="scheduler")
    tokens, (few, many) = 3 * 2, (4, 100)
    mu = 0.5 + 0.4 * (tokens - few) / (many - few)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist(), mu=mu)
    levels = policy.sigmas(num_steps)
    torch.testing.assert_close(levels.float(), scheduler.sigmas, rtol=0, atol=1e-6)
    assert levels[-2] == pytest.approx(0.02)


@pytest.mark.parametrize("exact", [False, True])
def test_the_level_is_told_in_float32_if_so_asked(pipeline, exact):
    policy = QwenImagePolicy(pipeline, 32, 32, exact_conditioning=exact)
    policy.load()
    text = policy.encoder(Encoding()).text
    conditions = Conditions(["a"], Text.collate(text.encode(["a"]), text.ragged), torch.arange(1))
    told = []
    projection = policy.transformer.time_text_embed.time_proj
    projection.register_forward_pre_hook(lambda _, arguments: told.append(arguments[0].float()))
    level = torch.tensor([0.9127])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        policy(torch.randn(1, *policy.latent_shape()), level, conditions, 1.0)
    assert torch.equal(told[0], level) == exact
    torch.testing.assert_close(told[0], level, rtol=0.01, atol=0)


def test_tokens_are_counted_as_they_are_cut(pipeline):
    encoder = QwenImagePolicy(pipeline, 32, 32).encoder(Encoding()).text
    prompts = ["", "a cat", "x" * 60, "x" * 90]
    rows = [len(own["prompt_embeds"]) for own in encoder.encode(prompts)]
    assert rows == [min(number, encoder.max_sequence_length) for number in encoder.num_tokens(prompts)]
    assert rows[1] < rows[3] == encoder.max_sequence_length


def test_words_that_might_follow_are_foretold_of_one_token_alone(pipeline):
    """Nobody reads them, and there are 152,064 numbers of each."""
    encoder = QwenImagePolicy(pipeline, 32, 32).encoder(Encoding()).text
    read = []
    head = encoder._load()["text_encoder"].lm_head
    head.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].shape))
    encoder.encode(["a cat", "3 dogs, running in the park"])
    assert read == [(2, 1, 16)]


def test_prompts_are_cut_and_guidance_moves_away_from_one_blank_as_the_pipeline_is_told(pipeline):
    """The blank is the negative prompt of Qwen-Image's model card; here it does not come from the policy."""
    policy, guidance, length = QwenImagePolicy(pipeline, 32, 32), 4.0, 24
    policy.load()
    text = policy.encoder(Encoding(length)).text
    (prompt, other), ragged = ("x" * 60, "a cat"), text.ragged
    rows, none = (text.encode(texts) for texts in ([prompt, other], [text.negative]))
    conditions = Conditions(
        [prompt, other], Text.collate(rows, ragged), torch.arange(2), unconditional=Text.collate(none, ragged)
    )
    noise = sample_noise(0, [0, 1], policy.latent_shape())
    with torch.no_grad():
        x0 = flow.integrate(lambda x, s: policy(x, s, conditions, guidance), noise, policy.sigmas(4))
        pictures = policy.decode(x0)
    pipe = diffusers.QwenImagePipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    told = {**policy.pipeline_arguments(guidance, length), "negative_prompt": [" ", " "]}
    theirs = pipe(
        [prompt, other], height=32, width=32, num_inference_steps=4, latents=noise, output_type="pt", **told
    ).images
    torch.testing.assert_close(pictures, theirs, rtol=0, atol=1e-5)


def test_kernels_that_take_no_mask_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"'_native_flash', which is .*, takes the masks .*: choose from native, "):
        QwenImagePolicy(pipeline, 32, 32, attention="_native_flash")


def test_a_transformer_that_reads_other_texts_is_refused(pipeline, tmp_path):
    own = QwenImagePolicy(pipeline, 32, 32).configs["transformer"]
    (tmp_path / "config.json").write_text(json.dumps(own | {"joint_attention_dim": 24}))
    with pytest.raises(ValueError, match="whose joint_attention_dim is 24 where that of pretrained is 16: give "):
        QwenImagePolicy(pipeline, 32, 32, transformer=str(tmp_path))
