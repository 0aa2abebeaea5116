"""What Chroma alone has: a mask that weakens padding, also in blocks that are recomputed, and one rounded number."""

import pytest
import torch

from srpo_lightning.batch import Conditions, Text
from srpo_lightning.encoding import Encoding
from srpo_lightning.policies import ChromaPolicy
from tests.families import tiny_chroma


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return str(tiny_chroma.write(tmp_path_factory.mktemp("chroma")))


@pytest.fixture(scope="module")
def text(pipeline):
    encoder = ChromaPolicy(pipeline, 32, 32).encoder(Encoding()).text
    return Text.collate(encoder.encode(["a cat", "a"]), encoder.ragged)


def test_the_first_padding_counts_as_the_prompts_own(pipeline, text):
    encoder = ChromaPolicy(pipeline, 32, 32).encoder(Encoding()).text
    counted = text.tensors["prompt_attention_mask"].sum(1).tolist()
    assert counted == [number + 1 for number in encoder.num_tokens(["a cat", "a"])]


def test_blocks_are_recomputed_with_the_mask_of_their_own_pass(pipeline, text):
    """Another pass, of other texts, has come between by the time of the backward pass."""
    x, sigma, gradients = torch.randn(2, 4, 16), torch.tensor([0.8, 0.7]), []
    other = text.each(lambda rows: rows.flip(0))
    for recomputed in (True, False):
        policy = ChromaPolicy(pipeline, 32, 32, gradient_checkpointing=recomputed)
        policy.load()
        velocity = policy(x, sigma, Conditions(["a cat", "a"], text, torch.arange(2)), 1.0)
        policy(x, sigma, Conditions(["a", "a cat"], other, torch.arange(2)), 1.0)
        velocity.square().mean().backward()
        gradients.append([p.grad for p in policy.transformer.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of the approximator's norms
@pytest.mark.parametrize("exact", [True, False])
def test_bfloat16_rounds_the_level_unless_it_is_to_be_exact(pipeline, text, exact):
    policy = ChromaPolicy(pipeline, 32, 32, exact_conditioning=exact)
    policy.load()
    told = []
    projection = policy.transformer.time_text_embed.time_proj
    projection.register_forward_pre_hook(lambda _, arguments: told.append(arguments[0].float()))
    level = torch.tensor([0.9127, 0.8])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        policy(torch.randn(2, *policy.latent_shape()), level, Conditions(["a cat", "a"], text, torch.arange(2)), 1.0)
    assert torch.equal(told[0], 1000 * level) == exact
    torch.testing.assert_close(told[0], 1000 * level, rtol=0.01, atol=0)


def test_kernels_that_take_no_mask_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"'_native_flash', which is .*, takes the masks .*: choose from native, "):
        ChromaPolicy(pipeline, 32, 32, attention="_native_flash")
