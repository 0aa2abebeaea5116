"""The algebra of Direct-Align, in float64: what must hold for every image, noise and pair of noise levels."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from srpo_lightning import flow

LEVEL = st.floats(0.0, 0.97)  # 1 / (1 - sigma) amplifies rounding: SRPO's window ends at 0.964
SEED = st.integers(0, 2**31)
TOLERANCE = 1e-12


def pair(seed: int, shape: tuple[int, ...] = (2, 3, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    x0, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x0, noise


def levels(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(SEED, LEVEL, LEVEL, LEVEL, LEVEL)
def test_the_true_velocity_recovers_the_image_exactly(seed, a1, b1, a2, b2):
    """Inject, step, recover is the identity on x0 when v = noise - x0 (design: "if v were exact, x0_hat == x0")."""
    x0, noise = pair(seed)
    sigma, sigma_next = levels(a1, a2), levels(b1, b2)
    x = flow.step(flow.inject(x0, noise, sigma), noise - x0, sigma, sigma_next)
    torch.testing.assert_close(flow.recover(x, noise, sigma_next), x0, rtol=0, atol=TOLERANCE)


@given(SEED, LEVEL, LEVEL)
def test_the_recovered_image_moves_with_the_velocity_by_step_over_signal(seed, a, b):
    """d x0_hat / d velocity = (b - a) / (1 - b), by autograd."""
    x0, noise = pair(seed)
    sigma, sigma_next = levels(a, a), levels(b, b)
    velocity = torch.zeros_like(x0).requires_grad_()
    x = flow.step(flow.inject(x0, noise, sigma), velocity, sigma, sigma_next)
    (gradient,) = torch.autograd.grad(flow.recover(x, noise, sigma_next).sum(), velocity)
    expected = torch.full_like(x0, (b - a) / (1 - b))
    torch.testing.assert_close(gradient, expected, rtol=TOLERANCE, atol=TOLERANCE)


@given(SEED, LEVEL)
def test_recover_undoes_inject(seed, sigma):
    x0, noise = pair(seed)
    level = levels(sigma, sigma)
    recovered = flow.recover(flow.inject(x0, noise, level), noise, level)
    torch.testing.assert_close(recovered, x0, rtol=0, atol=TOLERANCE)


@given(SEED, st.integers(1, 40), st.floats(0.5, 6.0))
def test_euler_along_a_straight_path_arrives_at_the_image_in_any_number_of_steps(seed, num_steps, shift):
    """The ODE dx / dsigma = noise - x0 has the solution x = inject(x0, noise, sigma)."""
    x0, noise = pair(seed)
    arrived = flow.integrate(lambda x, sigma: noise - x0, noise, flow.schedule(num_steps, shift))
    torch.testing.assert_close(arrived, x0, rtol=0, atol=TOLERANCE)


@given(st.integers(1, 200), st.floats(0.2, 8.0))
def test_a_schedule_falls_strictly_from_one_to_zero(num_steps, shift):
    sigmas = flow.schedule(num_steps, shift)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == num_steps + 1
    assert abs(sigmas[0] - 1) < 1e-15
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@given(st.floats(0, 1), st.floats(0.2, 8.0))
def test_shifting_back_by_the_inverse_shift_returns_the_level(sigma, shift):
    level = levels(sigma)
    torch.testing.assert_close(flow.shift_sigma(flow.shift_sigma(level, shift), 1 / shift), level, rtol=0, atol=1e-12)
