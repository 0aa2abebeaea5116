"""FluxPolicy and FluxTextEncoder against diffusers' FluxPipeline on the same folder."""

import pytest
import torch
from diffusers import FluxPipeline

from srpo_lightning import flow
from srpo_lightning.batch import Conditions, Text
from srpo_lightning.draws import sample_noise
from srpo_lightning.policies.flux import FluxTextEncoder
from srpo_lightning.policies.packing import image_ids, pack, unpack
from tests import tiny

PROMPTS = ["a cat", "3 dogs, running"]
SIZES = [(32, 32), (32, 64), (48, 16)]


@pytest.fixture(scope="module", params=[True, False], ids=["guided", "unguided"])
def pipeline_folder(request, models, tmp_path_factory):
    if request.param:
        return models.pipeline
    return tiny.write_pipeline(tmp_path_factory.mktemp("unguided") / "flux", guidance_embeds=False)


@pytest.fixture(scope="module")
def pipe(pipeline_folder):
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_packing_equals_the_pipelines(height, width):
    """FluxPipeline._pack_latents, bit for bit."""
    z = torch.randn(2, 4, height // 8, width // 8)
    packed = FluxPipeline._pack_latents(z, *z.shape)
    assert torch.equal(pack(z), packed)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_unpacking_equals_the_pipelines_and_undoes_packing(height, width):
    """FluxPipeline._unpack_latents, bit for bit."""
    z = torch.randn(2, 4, height // 8, width // 8)
    x = pack(z)
    assert torch.equal(unpack(x, (height, width)), FluxPipeline._unpack_latents(x, height, width, 8))
    assert torch.equal(unpack(x, (height, width)), z)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_image_ids_equal_the_pipelines(height, width):
    """FluxPipeline._prepare_latent_image_ids counts in packed rows and columns."""
    theirs = FluxPipeline._prepare_latent_image_ids(1, height // 16, width // 16, "cpu", torch.float32)
    assert torch.equal(image_ids((height, width), torch.zeros(1)), theirs)


@pytest.mark.parametrize("length", [tiny.MAX_TOKENS, 7])
def test_text_features_equal_the_pipelines_bit_for_bit(pipeline_folder, pipe, length):
    """FluxPipeline.encode_prompt with the same sequence length."""
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(PROMPTS, None, device="cpu", max_sequence_length=length)
    ours = FluxTextEncoder(str(pipeline_folder), max_sequence_length=length).encode(PROMPTS)
    assert torch.equal(torch.stack([f["prompt_embeds"] for f in ours]), embeds)
    assert torch.equal(torch.stack([f["pooled_prompt_embeds"] for f in ours]), pooled)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("num_steps", [1, 4])
def test_our_sampler_draws_the_pipelines_pictures(models, pipeline_folder, pipe, height, width, num_steps):
    """FluxPipeline.__call__ from the same noise and prompts; latents and pixels in float32."""
    policy = tiny.new_policy(models._replace(pipeline=pipeline_folder), height=height, width=width)
    noise = sample_noise(0, [0, 1], policy.latent_shape())
    embeds, pooled, _ = pipe.encode_prompt(PROMPTS, None, device="cpu", max_sequence_length=tiny.MAX_TOKENS)
    conditions = Conditions(PROMPTS, Text({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}), torch.arange(2))
    with torch.no_grad():
        latents = flow.integrate(lambda x, sigma: policy(x, sigma, conditions, 3.5), noise, policy.sigmas(num_steps))
        pictures = policy.decode(latents)

    def theirs(output_type: str) -> torch.Tensor:
        return pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            latents=noise,
            height=height,
            width=width,
            num_inference_steps=num_steps,
            guidance_scale=3.5,
            output_type=output_type,
        ).images

    torch.testing.assert_close(latents, theirs("latent"), rtol=0, atol=2e-5)
    torch.testing.assert_close(pictures, theirs("pt"), rtol=0, atol=2e-5)
    assert pictures.shape == (2, 3, height, width)
