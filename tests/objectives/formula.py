"""The setting of one step, in which an estimator is compared with its formula written out."""

from torch import Tensor

from srpo_lightning.draws import Draws
from tests.objectives import toy

N, GUIDANCE = 8, 0.7
SETTINGS = {"num_steps": N, "guidance": GUIDANCE}


class Formula:
    """The setting of one step, in the papers' terms."""

    def __init__(self, objective, step: int = 0):
        self.objective, self.draws = objective, Draws(0, step)
        self.policy, self.reward, self.conditions = toy.Field(), toy.Wavy(), toy.batch()
        self.rollout = toy.rollout(self.policy, objective, self.conditions, self.draws)
        self.states, self.sigma = self.rollout.trajectory, self.policy.sigmas(N)

    def v(self, x: Tensor, i: int) -> Tensor:
        return self.policy(x, self.sigma[i].expand(len(x)), self.conditions, GUIDANCE)

    def d(self, i: int) -> Tensor:
        return self.sigma[i + 1] - self.sigma[i]

    def rewards(self, x0: Tensor) -> Tensor:
        return self.reward(self.policy.decode(x0), self.conditions.prompts)

    def estimate(self) -> Tensor:
        return self.objective.loss(self.policy, self.reward, self.conditions, self.rollout, self.draws).loss


def mixed(x: Tensor, alpha: float) -> Tensor:
    return alpha * x + (1 - alpha) * x.detach()
