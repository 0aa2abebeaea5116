"""SRPO: Direct-Align with a semantic relative reward (arXiv 2509.06942).

The loss is `relu(margin - r)` with `r = (1 + lambda) R(x0_hat, positive) - R(x0_hat, negative)`; in the inversion
branch the words swap. The steps of the algorithm box are in direct_align.py, the reward of step 4 in reward_forms.py.
"""

from dataclasses import dataclass, field, fields

from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.direct_align import DirectAlign
from srpo_lightning.objectives.reward_forms import Relative, Wording


@dataclass(kw_only=True)
class SRPO(Wording, DirectAlign):
    """Semantic Relative Preference Optimization: both branches of Direct-Align under the relative reward."""

    form: Relative = field(init=False)
    inversion: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        """Make the form of the words, which refuses those that cannot steer."""
        wording = {own.name: getattr(self, own.name) for own in fields(Wording)}
        self.form = Relative(**wording)
        super().__post_init__()

    def texts(self, conditions: Conditions, draws: Draws) -> tuple[list[str], ...]:
        """The prompts under the step's positive word, and columns of texts to move away from."""
        return self.form.texts(conditions, draws)
