"""The base, which is the weights before training: how it is put in place again, and where what it drew is kept."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer

from srpo_lightning.evaluation.comparison import read_header, save_table
from srpo_lightning.evaluation.metrics import Table
from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.strict_json import strict_json
from srpo_lightning.module import SRPOModule
from srpo_lightning.run_folder import RunFolder


@contextmanager
def as_base(module: SRPOModule) -> Iterator[None]:
    """Put the base in the policy's place, for as long as this lasts; the policy waits in host memory."""
    waiting = {name: p.detach().to("cpu", copy=True) for name, p in module.trainable_parameters()}
    module.policy.restart()
    module.forget_gathered()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in module.trainable_parameters():
                parameter.copy_(waiting[name])
        module.forget_gathered()


def read_base(trainer: Trainer, key: str) -> Table | None:
    """The base's numbers, of the run or of an earlier `validate`; None where none were kept under this key."""
    found = (run.read_base(key) for run in (RunFolder.of(trainer), RunFolder.recording(trainer)))
    return next((table for table in found if table is not None), None)


def keep_base(trainer: Trainer, key: str, base: Table) -> None:
    """Save the base's numbers in the run folder, or beside `validate`'s where the run's own are of other settings."""
    path = RunFolder.of(trainer).base_table
    header = read_header(path) if path.is_file() else None
    is_others = header is not None and header["key"] != key
    save_table(RunFolder.recording(trainer).base_table if is_others else path, base, key)


def keep_prompts(trainer: Trainer) -> None:
    """Save the evaluation prompts with their tags beside the tables, which know them by number, unless they are there.

    They are rows of `prompt` and `tags`, as JSON.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    named = zip(data.eval_prompts, data.eval_tags, strict=True)
    content = strict_json([{"prompt": prompt, "tags": tags} for prompt, tags in named], 0)
    path = RunFolder.recording(trainer).prompts
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        with complete_or_absent(path) as partial:
            partial.write_text(content, encoding="utf-8")
