"""An objective of one's own: ReFL (arXiv 2304.05977) without its hinge."""

from collections.abc import Sequence

from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives import Objective, Outcome, Rollout
from srpo_lightning.objectives.base import reward_gradient, surrogate
from srpo_lightning.policies.base import Policy
from srpo_lightning.rewards import Reward

NUM_STEPS, STOP, GUIDANCE = 20, 15, 3.5


class LateReward(Objective):
    """The plain reward of the picture that is predicted from a late step."""

    def rollout(self, policy: Policy, conditions: Conditions, draws: Draws) -> Rollout:
        """Without gradient: noise, and the latents at the level of step 15."""
        shape = (conditions.batch_size, *policy.latent_shape(conditions.size))
        noise = draws.noise(shape, shared=False).to(conditions.device)
        sigmas = policy.sigmas(NUM_STEPS)[: STOP + 1]
        return Rollout(flow.integrate(lambda x, s: policy(x, s, conditions, GUIDANCE), noise, sigmas), noise)

    def loss(self, policy: Policy, reward: Reward, conditions: Conditions, rollout: Rollout, draws: Draws) -> Outcome:
        """One step with gradient to the picture, and the reward's gradient there."""
        sigma = policy.sigmas(NUM_STEPS)[STOP].to(rollout.x0).expand(conditions.batch_size)
        velocity = policy(rollout.x0, sigma, conditions, GUIDANCE)
        x0_hat = flow.step(rollout.x0, velocity, sigma, 0 * sigma)

        def score(latents: Tensor, rows: slice) -> Tensor:
            return reward(policy.decode(latents, conditions.size), conditions.prompts[rows])

        pull = reward_gradient(x0_hat, score, lambda rewards: -rewards)
        return Outcome(surrogate(pull, x0_hat), {"reward": pull.rewards.mean()})

    def score(self, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of finished pictures, for evaluation."""
        return reward(images, prompts)
