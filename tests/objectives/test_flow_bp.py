"""FlowBP's estimators against plain autograd through their formulas, written out here from the paper."""

import pytest
import torch
from torch import Tensor

from srpo_lightning.draws import Draws
from srpo_lightning.objectives import FlowBPBridge, FlowBPLagrange, FlowBPSparse
from srpo_lightning.objectives.flow_bp import quadrature_weights
from tests.objectives import toy
from tests.objectives.formula import SETTINGS, Formula, N, mixed


def times(v: Tensor, factor: float) -> Tensor:
    return v.detach() + factor * (v - v.detach())


@pytest.mark.parametrize("rescale", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("step", range(3))
def test_flow_bp_sparse_is_the_euler_sum_with_a_few_trained_velocities(step, rescale):
    f = Formula(FlowBPSparse(gradient_rescale=rescale, **SETTINGS), step)
    support = f.objective.draw_steps(f.draws, "support", 0, N, 3)
    assert len(support) == 3
    gain = 1 + rescale * (f.sigma[0] / sum(-f.d(i) for i in support) - 1)  # the whole way from noise to picture is 1
    v = [f.v(f.states[i], i) for i in range(N)]
    x0 = f.states[0] + sum(f.d(i) * (times(v[i], gain) if i in support else v[i].detach()) for i in range(N))
    torch.testing.assert_close(x0, f.states[-1], **toy.TOLERANCE)
    toy.assert_same_gradients(f.policy, f.estimate(), -f.rewards(x0).mean())


@pytest.mark.parametrize("step", range(8))
def test_flow_bp_bridge_reads_the_split_state_with_a_share_of_its_gradient(step):
    f = Formula(FlowBPBridge(**SETTINGS), step)
    before, j, after = f.objective.split(f.draws)
    trained = [*before, j, *after]
    assert sorted(set(trained)) == trained
    assert len(trained) == 5
    gain = f.sigma[0] / sum(f.sigma[i] - f.sigma[i + 1] for i in trained)

    def v(i: int, x: Tensor) -> Tensor:
        return times(f.v(x, i), gain if i in trained else 0.0)

    x_j = f.states[0] + sum(f.d(i) * v(i, f.states[i]) for i in range(j))
    x0 = x_j + f.d(j) * v(j, mixed(x_j, 0.1)) + sum(f.d(i) * v(i, f.states[i]) for i in range(j + 1, N))
    toy.assert_same_gradients(f.policy, f.estimate(), -f.rewards(x0).mean())


def test_flow_bp_bridge_splits_its_steps_in_proportion_and_keeps_one_before_and_one_at_the_split():
    objective = FlowBPBridge()  # 5 of 25 steps
    splits = [objective.split(Draws(0, step)) for step in range(300)]
    for before, j, after in splits:
        pre = min(max(round(5 * j / 25), 1), 4, j)
        assert len(before) == max(pre, 5 - (25 - j))
        assert len(before) + 1 + len(after) == 5
        assert max(before) < j < min(after, default=25)
    places = torch.tensor([j for _, j, _ in splits], dtype=torch.float64)
    assert places.mean() == pytest.approx(50 / 3, abs=1)  # the later one of two, drawn evenly among 25
    assert objective.split(Draws(0, 3)) == objective.split(Draws(0, 3, rank=2))


@pytest.mark.parametrize("step", range(6))
def test_flow_bp_lagrange_integrates_the_polynomials_through_its_supports(step):
    f = Formula(FlowBPLagrange(min_distance=0.01, **SETTINGS), step)
    k, j = f.objective.anchors(f.draws)

    def leap(x: Tensor, supports: list[int], target: int, at_start: Tensor) -> Tensor:
        nodes, powers = f.sigma[supports], torch.arange(len(supports))
        fit = torch.linalg.inv(nodes.unsqueeze(1) ** powers)  # coefficients of the Lagrange polynomials, by columns
        weights = (f.sigma[target] ** (powers + 1) - nodes[0] ** (powers + 1)) / (powers + 1) @ fit
        gain = 1 + 0.5 * (weights.abs().sum() / weights[:2].abs().sum() - 1)
        velocities = [at_start, *(f.v(f.states[i], i) for i in supports[1:])]
        for place, (w, v) in enumerate(zip(weights, velocities, strict=True)):
            x = x + w * times(v, (gain, 0.25 * gain, 0.0)[place])
        return x

    leap_j = leap(f.states[k], f.objective.supports(k, j), j, f.v(f.states[k], k))
    x_j = leap_j + (f.states[j] - leap_j).detach()
    leap_0 = leap(x_j, f.objective.supports(j, N), N, f.v(mixed(x_j, 0.1), j))
    x_0 = leap_0 + (f.states[-1] - leap_0).detach()
    d_j = (leap_j - f.states[j]).abs().mean((1, 2, 3)).clamp(min=0.01)
    d_0 = (leap_0 - f.states[-1]).abs().mean((1, 2, 3)).clamp(min=0.01)
    loss = -(f.rewards(x_0) / (d_j + d_0).detach()).mean()
    toy.assert_same_gradients(f.policy, f.estimate(), loss, rtol=1e-8, atol=1e-10)


def test_flow_bp_lagrange_draws_its_leaps_by_dirichlets_distribution_and_spaces_supports_evenly():
    objective = FlowBPLagrange()
    anchors = [objective.anchors(Draws(0, step)) for step in range(300)]
    assert all(0 <= k < j <= 23 for k, j in anchors)
    parts = torch.tensor([[24 - j, j - k, k + 1] for k, j in anchors], dtype=torch.float64)
    expected = 25 * torch.tensor([2.5, 6.0, 2.0], dtype=torch.float64) / 10.5
    torch.testing.assert_close(parts.mean(0), expected, rtol=0, atol=0.7)
    assert objective.anchors(Draws(0, 3)) == objective.anchors(Draws(0, 3, rank=2))
    assert objective.supports(3, 14) == [3, 8, 13]
    assert objective.supports(3, 5) == [3, 4]
    assert objective.supports(24, 25) == [24]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_quadrature_weights_sum_to_the_interval_and_integrate_polynomials_exactly(count):
    nodes = torch.linspace(0.9, 0.3, count, dtype=torch.float64)
    start, end = torch.tensor(0.95, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    weights = quadrature_weights(nodes, start, end)
    for degree in range(count):
        exact = (end ** (degree + 1) - start ** (degree + 1)) / (degree + 1)
        torch.testing.assert_close((weights * nodes**degree).sum(), exact, rtol=0, atol=1e-12)


def test_late_steps_are_drawn_more_often():
    objective = FlowBPSparse(num_steps=10)
    drawn = torch.tensor([objective.draw_steps(Draws(0, step), "support", 0, 10, 3) for step in range(200)])
    assert (drawn.diff(dim=1) > 0).all()
    counts = torch.bincount(drawn.flatten(), minlength=10)
    assert counts[:5].sum() < counts[5:].sum() / 3
