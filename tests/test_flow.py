import math

import torch

from srpo_lightning import flow


def test_each_sample_is_injected_at_its_own_level():
    x0, noise = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(flow.inject(x0, noise, torch.tensor([0.25, 0.75])), torch.tensor([[0.25] * 3, [0.75] * 3]))


def test_euler_follows_exponential_decay_to_first_order():
    """dx / dsigma = x from sigma 1 to 0 multiplies x by exp(-1); Euler's error halves when the steps double."""
    errors = [
        abs(flow.integrate(lambda x, sigma: x, torch.ones(1, 1, dtype=torch.float64), flow.schedule(n, 1.0)).item()
            - math.exp(-1))
        for n in (100, 200)
    ]  # fmt: skip
    assert errors[1] < 1e-3
    assert 1.98 < errors[0] / errors[1] < 2.02


def test_the_model_is_asked_at_every_level_but_the_last_in_the_dtype_of_the_latents():
    asked = []

    def velocity(x, sigma):
        asked.append(sigma)
        return torch.zeros_like(x)

    sigmas = flow.schedule(4, 3.0)
    flow.integrate(velocity, torch.zeros(2, 1), sigmas)
    assert all(sigma.dtype == torch.float32 and sigma.shape == (2,) for sigma in asked)
    assert torch.equal(torch.stack(asked)[:, 0], sigmas[:-1].float())


def test_the_srpo_window_lies_where_the_paper_puts_it():
    """The window: steps 5 and 25 of 50, shift 3, are sigma 0.964 and 0.75."""
    sigmas = flow.schedule(50, 3.0)
    assert round(float(sigmas[5]), 3) == 0.964
    assert float(sigmas[25]) == 0.75
