"""What FLUX.2-dev alone has: a processor around its tokenizer, pictures in prompts, a guidance that is told."""

import diffusers
import pytest
import torch
from transformers import ProcessorMixin

from srpo_lightning.encoding import Encoding
from srpo_lightning.policies import Flux2Policy
from tests.families import tiny_flux2, tiny_flux2_dev


class TextProcessor(ProcessorMixin):
    """What PixtralProcessor does with texts; that class cannot be imported without torchvision."""

    def __init__(self, tokenizer=None, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_flux2_dev.write(tmp_path_factory.mktemp("flux2_dev"))


@pytest.fixture(scope="module")
def pipe(pipeline):
    """With the processor in the tokenizer's place, as in the published folder."""
    pipe = diffusers.Flux2Pipeline.from_pretrained(pipeline)
    pipe.tokenizer = TextProcessor(pipe.tokenizer, chat_template=tiny_flux2_dev.CHAT)
    return pipe


@pytest.mark.parametrize("prompt", ["", "a cat", "a [IMG]cat", "a cat that is longer than all of the tokens"])
def test_features_are_those_of_the_processor(pipeline, pipe, prompt):
    """Its conversations begin with one token of their own, not with two; "[IMG]" in a prompt is no picture."""
    encoder = Flux2Policy(str(pipeline), 32, 32).encoder(Encoding()).text
    with torch.no_grad():
        expected, _ = pipe.encode_prompt([prompt], max_sequence_length=encoder.max_sequence_length)
    assert torch.equal(encoder.encode([prompt])[0]["prompt_embeds"], expected[0])


def test_klein_and_dev_are_told_apart_by_the_embedded_guidance(pipeline, tmp_path):
    dev = Flux2Policy(str(pipeline), 32, 32)
    klein = Flux2Policy(str(tiny_flux2.write(tmp_path)), 32, 32)
    assert (dev.pipeline_class, klein.pipeline_class) == ("Flux2Pipeline", "Flux2KleinPipeline")
    assert (dev.has_negative, klein.has_negative) == (False, True)
    with pytest.raises(ValueError, match="guidance_embeds is False where that of pretrained is True"):
        Flux2Policy(str(pipeline), 32, 32, transformer=str(tmp_path / "transformer"))
