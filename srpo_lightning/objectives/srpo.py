"""SRPO: Direct-Align with a semantic relative reward (arXiv 2509.06942)."""

from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.direct_align import DirectAlign
from srpo_lightning.objectives.reward_forms import ControlWords, Relative


class SRPO(DirectAlign):
    """Semantic Relative Preference Optimization.

    The steps of the algorithm box are in direct_align.py, the reward of step 4 in reward_forms.py.

    Args:
        control_words: the positive and the negative words.
        word_choice: go through the words step by step, or draw them at random.
        template: how a word meets a prompt.
        num_rollout_steps: Euler steps of the rollout.
        rollout_guidance: distilled guidance of the rollout (1 for HPSv2.1, 2 for PickScore).
        guidance: distilled guidance of the trained step.
        shift: of the noise levels; None takes the one of the model's scheduler.
        num_schedule_steps: steps of the schedule that `window` counts in.
        window: first and last step of the schedule between which noise levels are trained.
        grid_size: noise levels on a straight line across the window.
        ground_truth_ratio: the trained step covers the rest, 1 - ratio, of the window at most.
        edge: positions closer than this to either end of the grid are not drawn.
        denoise_lambda: lambda of the denoising branch, from the noisy to the clean end of the grid.
        inversion_lambda: the same of the inversion branch.
        margin: the hinge: a reward above it has no gradient.
        shared_noise: all samples of an optimizer step, on every rank, have the same noise (their prompts differ).
        position_per_sample: each sample has its own position on the grid, as in the official run, instead of one for
            all samples of an optimizer step.
        reward_batch_size: images decoded and scored at once; None: the whole batch.
    """

    def __init__(
        self,
        control_words: ControlWords,
        word_choice: Literal["cycle", "random"] = "cycle",
        template: str = "{word}. {prompt}",
        num_rollout_steps: PositiveInt = 25,
        rollout_guidance: NonNegativeFloat = 1.0,
        guidance: NonNegativeFloat = 3.5,
        shift: PositiveFloat | None = 3.0,
        num_schedule_steps: PositiveInt = 50,
        window: tuple[NonNegativeInt, PositiveInt] = (5, 25),
        grid_size: PositiveInt = 1000,
        ground_truth_ratio: ClosedUnitInterval = 0.9,
        edge: PositiveInt = 5,
        denoise_lambda: tuple[float, float] = (0.1, 0.25),
        inversion_lambda: tuple[float, float] = (0.3, 0.01),
        margin: float = 0.7,
        shared_noise: bool = True,
        position_per_sample: bool = True,
        reward_batch_size: PositiveInt | None = None,
    ) -> None:
        self.relative = Relative(control_words, word_choice, template)
        self.control_words = control_words
        super().__init__(
            self.relative,
            True,
            num_rollout_steps,
            rollout_guidance,
            guidance,
            shift,
            num_schedule_steps,
            window,
            grid_size,
            ground_truth_ratio,
            edge,
            denoise_lambda,
            inversion_lambda,
            margin,
            shared_noise,
            position_per_sample,
            reward_batch_size,
        )

    def texts(self, conditions: Conditions, draws: Draws) -> tuple[list[str], list[str]]:
        """The prompts under the step's positive word and under its negative word, or their own negative prompts."""
        return self.relative.texts(conditions, draws)
