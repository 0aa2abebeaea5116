"""Noise levels against diffusers' scheduler, set up as FluxPipeline sets it up."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from srpo_lightning import flow
from srpo_lightning.policies.family import resolution_dependent_shift


@pytest.mark.parametrize("num_steps", [1, 4, 25, 28, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_schedule_equals_diffusers_static_shift(num_steps, shift):
    """FlowMatchEulerDiscreteScheduler.set_timesteps; it computes in float32."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps))
    torch.testing.assert_close(flow.schedule(num_steps, shift).float(), scheduler.sigmas, rtol=0, atol=2e-7)


@pytest.mark.parametrize("num_tokens", [256, 1024, 2025, 4096])
def test_the_resolution_dependent_shift_equals_diffusers_dynamic_shifting(num_tokens):
    """FlowMatchEulerDiscreteScheduler with FLUX.1-dev's settings and FluxPipeline's calculate_shift."""
    config = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **config)
    mu = calculate_shift(num_tokens, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 28, 28), mu=mu)
    sigmas = flow.schedule(28, resolution_dependent_shift(num_tokens, config))
    torch.testing.assert_close(sigmas.float(), scheduler.sigmas, rtol=0, atol=2e-7)


def test_a_scheduler_that_says_nothing_gets_the_rule_of_flux():
    assert resolution_dependent_shift(4096, {}) == pytest.approx(np.exp(1.15), rel=1e-12)
