"""The checker of shapes: `python -m pytest --jaxtyping-packages=srpo_lightning,tests.shapes.check`.

jsonargparse's restricted numbers (PositiveInt, ...) are checked where the command line is parsed; at run time they are
plain numbers, and that is how beartype is told to read them.
"""

from beartype import BeartypeConf, FrozenDict, beartype
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt

check = beartype(
    conf=BeartypeConf(
        hint_overrides=FrozenDict(
            {
                PositiveInt: int,
                NonNegativeInt: int,
                PositiveFloat: float | int,
                ClosedUnitInterval: float | int,
            }
        ),
        is_pep484_tower=True,
    )
)
