"""The README.md of an exported model: what it is, how to load it, where it comes from, and what was measured."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch

import srpo_lightning
from srpo_lightning.callbacks.report import first_heading, markdown
from srpo_lightning.files.markdown import Markdown, code, escaped, markdown_table
from srpo_lightning.files.provenance import revision
from srpo_lightning.jobs.export.comparison import Difference
from srpo_lightning.jobs.export.formats import Format
from srpo_lightning.jobs.export.weights import Kind
from srpo_lightning.module import SRPOModule
from srpo_lightning.run_folder import RunFolder


class Export(NamedTuple):
    """What a card is about.

    Args:
        folder: Folder of the export under its final name.
        format: Form of what is in it.
        kind: Kind of the checkpoint's weights.
        checkpoint: Checkpoint that was exported.
        run: Folder of its run.
        prompts: Prompts that were trained on; None where they cannot be read any more.
        difference: Difference that the check found; None where it was left out.
        code: Code that loads the files and draws a picture.
    """

    folder: Path
    format: Format
    kind: Kind
    checkpoint: Path
    run: RunFolder
    prompts: Sequence[str] | None
    difference: Difference | None
    code: str


def card(export: Export, module: SRPOModule) -> str:
    """Markdown, with the hub's front matter."""
    policy = export.format.policy
    kind = "ema, the moving average" if export.kind == "ema" else "policy"
    check = f"pixels differ by: {export.difference}" if export.difference else Markdown("left out (`--check false`)")
    prompts = Markdown("not known: their files cannot be read any more")
    if export.prompts is not None:
        digest = prompts_hash(export.prompts)
        prompts = Markdown(f"{len(export.prompts)}, SHA-256 of the texts, a line feed after each: `{digest}`")
    rows = {
        "checkpoint": Markdown(f"{code(export.checkpoint.name)} of step {module.loaded_steps}, its {kind}"),
        "written in": str(export.format.dtype)[6:],
        "training prompts": prompts,
        "check: the picture of the code above against the checkpoint's own (`check/`)": check,
        "versions": f"srpo_lightning {srpo_lightning.__version__}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}",
        "revision of srpo_lightning": revision() or "not known",
    }
    return f"""{front_matter(export, module)}
# {escaped(export.folder.name)}

{code(policy.start or policy.pretrained)}, aligned with human preference by {method(module)} in
[config.yaml](config.yaml).

The licence of the base model applies to these weights as well: read it before you use or share them.

## Use

{usage(export)}

## Origin

{markdown_table(["", ""], [[Markdown(name), value] for name, value in rows.items()])}

## Metrics

{metrics(export, module)}"""


def method(module: SRPOModule) -> str:
    """The objective's name, with its paper."""
    paper = module.objective.paper
    name = code(type(module.objective).__name__)
    return name if paper is None else f"{name} ([arXiv {paper}](https://arxiv.org/abs/{paper}))"


def front_matter(export: Export, module: SRPOModule) -> str:
    """What the hub reads; a base that is a local folder has no name there."""
    policy = export.format.policy
    task = "text-to-video" if policy.num_frames > 1 else "text-to-image"
    tags = [type(module.objective).__name__.lower(), task, policy.hub_tag, *(["lora"] if policy.adapter else [])]
    values: dict[str, object] = {"library_name": "diffusers", "pipeline_tag": task, "tags": tags}
    values |= {"license": "other", "license_name": "license-of-the-base-model"}
    base = policy.start or policy.pretrained
    if not Path(base).expanduser().exists():
        values |= {"base_model": base, "base_model_relation": export.format.relation}
    return "\n".join(
        ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()), "---", ""]
    )


def usage(export: Export) -> str:
    """How to load the files."""
    own = export.format
    alone = "\n".join(["```python", export.code, "```"])
    parts = [f"{own.elsewhere}." if own.elsewhere else alone, f"In ComfyUI {own.comfyui}." if own.comfyui else ""]
    return "\n\n".join(part for part in parts if part)


def metrics(export: Export, module: SRPOModule) -> str:
    """The run's first evaluation beside that of the exported weights."""
    records = export.run.read_metrics()
    wanted = (module.loaded_steps, export.kind)
    exported = [record for record in records if (record["step"], record["weights"]) == wanted]
    if not exported:
        return "These weights were not evaluated in their run.\n"
    return markdown({first_heading(records[0]): records[0], f"exported {export.kind}": exported[-1]})


def prompts_hash(prompts: Sequence[str]) -> str:
    """SHA-256 of the texts in UTF-8, a line feed after each."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt}\n".encode())
    return digest.hexdigest()
