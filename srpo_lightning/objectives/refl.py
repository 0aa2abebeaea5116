"""ReFL for flow matching, the reward of `x0_hat = x - sigma v(x, sigma)` at a random late step (arXiv 2304.05977).

The paper, ImageReward, defines it for diffusion models. Here the prediction is that of flow matching, and there is no
pre-training loss beside the reward's. The loss is not scaled by 1e-3: AdamW does not see such a factor, the clipping of
the gradient does.
"""

from dataclasses import dataclass
from typing import ClassVar

from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.trajectory import RewardGradientObjective
from srpo_lightning.policies.base import Policy


@dataclass(kw_only=True)
class ReFL(RewardGradientObjective):
    """Denoise to a random late step, predict the picture from there with gradient, raise its reward.

    The default margin of 2 fits ImageReward.

    Args:
        late_steps: Range of steps, counted from the noise, both ends included, in which the trained one is drawn.

    Raises:
        ValueError: if a late step is not in the trajectory.
    """

    paper: ClassVar[str | None] = "2304.05977"

    num_steps: PositiveInt = 40
    margin: float | None = 2.0
    late_steps: tuple[NonNegativeInt, NonNegativeInt] = (30, 39)

    def __post_init__(self) -> None:
        """Refuse steps that are not there."""
        super().__post_init__()
        if not self.late_steps[0] <= self.late_steps[1] < self.num_steps:
            raise ValueError(
                f"late_steps is {list(self.late_steps)}: its first must not come after its last, and the last is at "
                f"most {self.num_steps - 1}, the last step of the trajectory (num_steps {self.num_steps})"
            )

    def stop(self, draws: Draws) -> int:
        """The late step, the same for all samples and ranks."""
        return draws.choice("late step", *self.late_steps)

    def x0_hat(
        self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws
    ) -> Tensor:
        """`x0_hat = x - sigma v(x, sigma)`."""
        x, sigma = trajectory[-1], sigmas[len(trajectory) - 1]
        return flow.step(x, self.velocity(policy, x, sigma, conditions), sigma, sigmas[-1])
