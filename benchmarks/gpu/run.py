"""Runs the parts one after the other, within the time that there is."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.isolated import is_late, run_alone
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.scale import Scale

LEAST_S = 45.0
"""Seconds that a part is worth starting with: imports take a quarter of it."""

PASSED, FAILED, MEASURED, LATE, NOT_REACHED = "passed", "failed", "measured", "out of time", "not reached"


def run_parts(names: Iterable[str], scale: Scale, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each part's name and result, as soon as it is there.

    A result has `state`, PASSED, FAILED, MEASURED (where there is nothing to fail), LATE or NOT_REACHED, and `seconds`.

    Args:
        names: Names of the parts in their order, of PARTS.
        scale: Where, and how large.
        seconds: Seconds for all of them.
    """
    logs = Path(scale.folder) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    for name in names:
        part, start = PARTS[name], time.monotonic()
        limit = min(part.limit_s, end - start)
        if limit < LEAST_S:
            yield name, {"state": NOT_REACHED, "seconds": 0.0}
            continue
        log = logs / f"{''.join(letter if letter.isalnum() else '_' for letter in name)}.log"
        found = run_alone(f"benchmarks.gpu.{part.function}", limit, log, scale=scale, **part.arguments)
        yield name, {"state": state_of(found, decides=part.decides), "seconds": time.monotonic() - start, **found}


def state_of(found: dict[str, Any], *, decides: bool = True) -> str:
    """How a part has ended, one that can fail or one that decides nothing; one that is cut off may have failed."""
    if is_late(found) and found.get("passed") is not False:
        return LATE
    if "error" in found:
        return FAILED if decides else MEASURED
    return {None: MEASURED, True: PASSED, False: FAILED}[found.get("passed")]
