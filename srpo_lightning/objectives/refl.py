"""ReFL for flow matching (ImageReward, arXiv 2304.05977)."""

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.reward_forms import RewardForm
from srpo_lightning.objectives.trajectory import TrajectoryObjective
from srpo_lightning.policies.base import Policy


class ReFL(TrajectoryObjective):
    """Denoise to a random late step, predict the picture from there with gradient, raise its reward.

    Departures: the prediction is that of flow matching, `x - sigma v`; no pre-training loss beside the reward's; the
    loss is not scaled by 1e-3, which AdamW does not see (the clipping of the gradient does).

    Args:
        form: what is asked of the reward; None: the plain reward.
        num_steps: Euler steps of the whole trajectory.
        late_steps: the steps, counted from the noise, among which the trained one is drawn, both ends included.
        guidance: distilled guidance, of the rollout and of the trained step alike.
        shift: of the noise levels; None takes the one of the model's scheduler.
        margin: the hinge `relu(margin - r)`; 2 fits ImageReward; None: the loss is `-r`.
        shared_noise: all samples of a step, on every rank, have the same noise.
        reward_batch_size: images decoded and scored at once; None: the whole batch.

    Raises:
        ValueError: if a late step is not in the trajectory.
    """

    def __init__(
        self,
        form: RewardForm | None = None,
        num_steps: PositiveInt = 40,
        late_steps: tuple[NonNegativeInt, NonNegativeInt] = (30, 39),
        guidance: NonNegativeFloat = 3.5,
        shift: PositiveFloat | None = None,
        margin: float | None = 2.0,
        shared_noise: bool = False,
        reward_batch_size: PositiveInt | None = None,
    ) -> None:
        super().__init__(form, num_steps, guidance, shift, margin, shared_noise, reward_batch_size)
        if not late_steps[0] <= late_steps[1] < num_steps:
            raise ValueError(
                f"late_steps is {list(late_steps)}: its first must not come after its last, and the last is at most "
                f"{num_steps - 1}, the last step of the trajectory (num_steps {num_steps})"
            )
        self.late_steps = late_steps

    def stop(self, draws: Draws) -> int:
        """The late step, the same for all samples and ranks."""
        return draws.choice("late step", *self.late_steps)

    def end(self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws) -> Tensor:
        """`x0_hat = x - sigma v(x, sigma)`."""
        x, sigma = trajectory[-1], sigmas[len(trajectory) - 1]
        return flow.step(x, self.velocity(policy, x, sigma, conditions), sigma, sigmas[-1])
