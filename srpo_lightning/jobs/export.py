"""`export`: a checkpoint as what diffusers and ComfyUI load, compared with what it is of, with a model card."""

import shutil
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.cli import LightningArgumentParser

from srpo_lightning.arguments import read_config
from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks.checkpoint import find_checkpoint
from srpo_lightning.callbacks.lora import PREFIX
from srpo_lightning.checkpoints import FOLDER, begin_folder, checkpoints, finish_folder
from srpo_lightning.data import PromptData
from srpo_lightning.jobs.comparison import Difference, difference, own_pictures, plain_pictures, write_pictures
from srpo_lightning.jobs.formats import FORMATS, Format
from srpo_lightning.jobs.model_card import Export, card
from srpo_lightning.jobs.weights import Kind, read_trained
from srpo_lightning.module import SRPOModule
from srpo_lightning.policies import FluxPolicy

NUM_PICTURES = 4
EXACT, ROUNDED = 1e-4, 0.1
"""The mean difference that pictures may have: computed in float32 from float32 files, or with bfloat16 anywhere.

Rounding all weights of the built-in model to bfloat16 makes 0.03, other prompts make 0.26.
"""


def export(
    config: str,
    output: str,
    ckpt_path: str = "last",
    format: Literal["diffusers", "single-file", "lora"] = "diffusers",
    weights: Kind = "ema",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    check: bool = True,
    device: str = "auto",
) -> None:
    """Write a checkpoint as a diffusers transformer, a single file for ComfyUI, or LoRA files, with a model card.

    Args:
        config: the run's own config.yaml.
        output: the folder to write.
        ckpt_path: last, best (in checkpoint.monitor), or a checkpoint, sharded or not.
        format: a folder for `FluxTransformer2DModel.from_pretrained`; a safetensors file with the names of Black Forest
            Labs, for ComfyUI; or an adapter's own weights, for `FluxPipeline.load_lora_weights`. The first two of a run
            that trained an adapter have it in the weights.
        weights: the average, or the weights that were trained.
        dtype: of the weights written.
        check: load the result in plain diffusers, compare its pictures of the first evaluation prompts with the
            checkpoint's, and write both to `check/`. Takes the memory of sampling.
        device: where to compare; auto takes a GPU if there is one.

    Raises:
        ValueError: naming the cure, if configuration, checkpoint and format do not fit together, or the check fails.
    """
    folder = Path(output).expanduser()
    if folder.exists():
        raise ValueError(f"{folder} exists already: name another output, or delete it")
    settings = read_config(config)
    run = run_folder(config, settings)
    if ckpt_path in ("last", "best") and not checkpoints(run):
        raise ValueError(f"{run} holds no checkpoint: give the config.yaml of a run that has saved one, or --ckpt_path")
    checkpoint = find_checkpoint(ckpt_path, run, settings.checkpoint.monitor, settings.checkpoint.mode)
    module = new_module(settings)
    policy = module.policy
    assert isinstance(policy, FluxPolicy)
    if format == "lora" and policy.adapter is None:
        raise ValueError(
            "the run trained the whole transformer, and there is no adapter that --format lora could write: choose "
            "diffusers or single-file"
        )
    policy.transformer = policy.outline()
    trained = read_trained(checkpoint, weights, module)
    written = FORMATS[format](policy, policy.transformer, trained, getattr(torch, dtype), folder.name)
    data = new_data(settings)
    incomplete = begin_folder(folder)
    written.write(incomplete)
    found = None
    if check:
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        found = compare(written, settings, incomplete, data, torch.device(chosen))
        print(f"pictures by diffusers against the checkpoint's: {found}")
    exported = Export(folder, written, weights, checkpoint, run, data.train_prompts, found)
    (incomplete / "README.md").write_text(card(exported, module), encoding="utf-8")
    shutil.copy(Path(config).expanduser(), incomplete / "config.yaml")
    finish_folder(incomplete, folder)
    print(f"{folder}: step {module.loaded_steps}, {weights}, {dtype}")


@torch.no_grad()
def compare(written: Format, settings: Namespace, folder: Path, data: PromptData, device: torch.device) -> Difference:
    """Draw the first evaluation prompts with the checkpoint and with what was written, into `check/`.

    Raises:
        ValueError: if the pictures differ by more than rounding explains.
    """
    mixed = settings.trainer.precision == "bf16-mixed"
    module = new_module(settings)
    policy = module.policy
    assert isinstance(policy, FluxPolicy)
    policy.vae_dtype = torch.float32  # decoding is not what is compared
    policy.quantize_timesteps = False  # diffusers does not
    conditions = move_data_to_device(first_prompts(data), device)
    policy.load()
    for name, parameter in module.trainable_parameters():
        parameter.copy_(written.trained[name.removeprefix(PREFIX)].read())
    ours = own_pictures(module.to(device), conditions, mixed=mixed)
    policy.transformer = None  # frees it
    theirs = plain_pictures(written.load(folder, mixed=mixed), module, conditions, mixed=mixed)
    write_pictures(folder / "check", ours=ours, diffusers=theirs)
    is_exact = written.dtype == torch.float32 and not mixed
    found = difference(ours, theirs, EXACT if is_exact else ROUNDED)
    if not found.mean <= found.allowed:
        raise ValueError(
            f"the pictures that diffusers draws with {folder} are not the checkpoint's ({found}): look at "
            f"{folder / 'check'}; if they are alike, export with --dtype float32, or --check false"
        )
    return found


def run_folder(config: str, settings: Namespace) -> Path:
    """Where the run is: beside its config.yaml, also after it was moved, or where the configuration says."""
    own = Path(config).expanduser().parent
    return own if (own / FOLDER).is_dir() else Path(settings.trainer.default_root_dir)


def new_module(settings: Namespace) -> SRPOModule:
    """The run's module without weights; a base that was kept in 4 bits is taken as it was before.

    Raises:
        ValueError: if its policy is none that could be exported.
    """
    own = settings.model.clone()
    if own.policy.init_args.get("quantize"):
        own.policy.init_args.quantize = "none"
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(SRPOModule, "model")
    module: SRPOModule = parser.instantiate_classes(Namespace(model=own)).model
    if not isinstance(module.policy, FluxPolicy):
        raise ValueError(f"export writes FLUX transformers, and model.policy is {type(module.policy).__name__}")
    return module


def new_data(settings: Namespace) -> PromptData:
    """The run's prompts, of the evaluation the first few only."""
    own = settings.data.clone()
    own.num_eval_prompts = min(own.num_eval_prompts or NUM_PICTURES, NUM_PICTURES)
    own.eval_batch_size, own.eval_samples_per_prompt, own.num_workers = NUM_PICTURES, 1, 0
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(PromptData, "data")
    data: PromptData = parser.instantiate_classes(Namespace(data=own)).data
    return data


def first_prompts(data: PromptData) -> Conditions:
    """The first batch of the evaluation."""
    data.preparation._replace(selection=data.selection.to_evaluate).run()
    batch: Conditions = next(iter(data.val_dataloader()))
    return batch
