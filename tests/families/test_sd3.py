"""What Stable Diffusion 3 alone has: a table of positions that is no parameter, and levels that are shifted twice."""

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from srpo_lightning.policies import Lora, SD3Policy
from tests.families import tiny_sd3

TABLE = "pos_embed.pos_embed"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return str(tiny_sd3.write(tmp_path_factory.mktemp("sd3")))


@pytest.mark.parametrize("num_steps", [1, 4, 28])
def test_levels_are_those_that_the_scheduler_chooses_by_itself(pipeline, num_steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline, subfolder="scheduler")
    scheduler.set_timesteps(num_steps)
    levels = SD3Policy(pipeline, 32, 32).sigmas(num_steps)
    torch.testing.assert_close(levels.float(), scheduler.sigmas, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 8, 28])
def test_levels_by_resolution_are_those_that_the_scheduler_chooses(pipeline, num_steps):
    policy = SD3Policy(pipeline, 512, 512, resolution_shift=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        pipeline, subfolder="scheduler", use_dynamic_shifting=True
    )
    shift = calculate_shift(policy.num_tokens((512, 512)), max_shift=scheduler.config.max_shift)
    scheduler.set_timesteps(num_steps, mu=shift)
    torch.testing.assert_close(policy.sigmas(num_steps).float(), scheduler.sigmas, rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapter", [None, Lora(rank=2)], ids=["full", "lora"])
def test_the_table_of_positions_is_read_where_weights_are_streamed(pipeline, adapter):
    """To a rank the model comes without any numbers in it, buffers neither."""
    whole, streamed = (SD3Policy(pipeline, 32, 32, adapter=adapter) for _ in range(2))
    whole.load()
    streamed.load(lambda model, blocks: model.to_empty(device="cpu"))
    tables = [policy.transformer.get_buffer(TABLE) for policy in (whole, streamed)]
    assert torch.equal(*tables)
    config = SD3Policy(pipeline, 32, 32).configs["transformer"]
    made = diffusers.SD3Transformer2DModel.from_config(config).get_buffer(TABLE)
    assert not torch.equal(tables[0], made), "the file's is not the one that the configuration makes"


def test_the_outline_is_the_models_but_for_the_tables_numbers(pipeline):
    policy = SD3Policy(pipeline, 32, 32)
    outline, whole = policy.outline(), diffusers.SD3Transformer2DModel.from_config(policy.configs["transformer"])
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (outline, whole)]
    assert shapes[0] == shapes[1]
    assert outline.config == whole.config
    assert outline.get_buffer(TABLE).is_meta


def test_a_kernel_that_no_block_would_call_is_refused(pipeline):
    with pytest.raises(ValueError, match=r"attention is set, but the blocks of SD3Policy call torch's.*set it to null"):
        SD3Policy(pipeline, 32, 32, attention="_native_math")
