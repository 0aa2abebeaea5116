"""Whether the records that a resumed run trains on are those of the checkpoint."""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from srpo_lightning.data.order import Order
from srpo_lightning.training.agreement import digest

KEY_BYTES = 8


class Records(NamedTuple):
    """What row numbers of the stream mean, as a checkpoint keeps it.

    Args:
        texts: a key of each record's text, in order.
        order: a function of everything else that the order depends on.
    """

    texts: str
    order: str

    @classmethod
    def of(cls, texts: Sequence[str], order: Order) -> "Records":
        """Of the records of a run."""
        keys = b"".join(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES] for text in texts)
        return cls(base64.b64encode(keys).decode(), digest(order.description()))

    def since(self, before: "Records") -> str | None:
        """In words what has changed since the checkpoint was written; None: nothing."""
        if self == before:
            return None
        then, now = before._counts(), self._counts()
        added, removed = (now - then).total(), (then - now).total()
        if added or removed:
            return f"training prompts: {added} added and {removed} removed since the checkpoint was written"
        return "training prompts: in another order, or drawn otherwise, than when the checkpoint was written"

    def _counts(self) -> Counter[bytes]:
        keys = base64.b64decode(self.texts)
        return Counter(keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))
