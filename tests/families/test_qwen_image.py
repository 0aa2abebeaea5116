"""What Qwen-Image alone has: a text branch that ends unread, a stretched schedule, a level that autocast rounds."""

import diffusers
import pytest
import torch

from srpo_lightning.batch import Conditions, Text
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
