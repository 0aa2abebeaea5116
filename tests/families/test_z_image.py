"""What Z-Image alone has: how it is told the level, noise in float32, conversations as prompts."""

import diffusers
import pytest
import torch

from srpo_lightning.batch import Conditions, Text
from srpo_lightning.encoding import Encoding
from srpo_lightning.policies import ZImagePolicy
from tests.families import tiny_z_image


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_z_image.write(tmp_path_factory.mktemp("z_image"))


@pytest.fixture
def policy(pipeline):
    policy = ZImagePolicy(str(pipeline), 32, 32)
    policy.load()
    return policy


def test_the_levels_that_it_is_told_are_the_pipelines_bit_for_bit(policy, pipeline):
    """ZImagePipeline.__call__ makes them of the scheduler's timesteps, which more steps than these round otherwise."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline, subfolder="scheduler")
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 8, 8).tolist())
    told = []
    policy.transformer.register_forward_pre_hook(lambda _, arguments: told.append(arguments[1]))
    text = Text({"prompt_embeds": torch.zeros(1, 3, 16)})
    x = torch.zeros(1, *policy.latent_shape())
    with torch.no_grad():
        for sigma in policy.sigmas(8)[:-1]:
            policy(x, sigma.float().expand(1), Conditions(["a"], text, torch.arange(1)), 1.0)
    assert torch.equal(torch.cat(told), (1000 - scheduler.timesteps) / 1000)


def test_noise_is_in_float32_where_all_else_is_in_bfloat16(policy):
    noise = policy.pipeline_noise(torch.Generator().manual_seed(3), torch.bfloat16)
    assert torch.equal(noise, torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3)))


def test_tokens_are_counted_with_the_turns_of_the_conversation(policy):
    encoder = policy.encoder(Encoding()).text
    prompts = ["", "a cat", "x" * 60]
    numbers = encoder.num_tokens(prompts)
    rows = [len(own["prompt_embeds"]) for own in encoder.encode(prompts)]
    assert numbers[0] == 8
    assert rows == [min(number, encoder.max_sequence_length) for number in numbers]
    assert numbers[2] > encoder.max_sequence_length
