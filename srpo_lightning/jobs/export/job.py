"""`export`: a checkpoint as what diffusers and ComfyUI load, compared with what it is of, with a model card."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import torch
from jsonargparse import Namespace

from srpo_lightning.callbacks.lora import PREFIX
from srpo_lightning.config.arguments import new_data, new_module, read_config
from srpo_lightning.encoding import Encoding
from srpo_lightning.files.checkpoints import check_whole, complete_or_absent_folder
from srpo_lightning.jobs.export import usage
from srpo_lightning.jobs.export.comparison import Difference, difference, own_frames, write_pictures
from srpo_lightning.jobs.export.formats import DiffusersFolder, Format, SingleFile
from srpo_lightning.jobs.export.hub import make_repository, upload
from srpo_lightning.jobs.export.lora_formats import LoraComfy, LoraFiles
from srpo_lightning.jobs.export.model_card import Export, card
from srpo_lightning.jobs.export.weights import Kind, read_trained
from srpo_lightning.module import SRPOModule
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.run_folder import RunFolder
from srpo_lightning.training.devices import chosen_device

PROMPT = "a cat"
"""Of the card's picture, where no evaluation prompt can be read."""

FORMATS: dict[str, type[Format]] = {
    "diffusers": DiffusersFolder,
    "single-file": SingleFile,
    "lora": LoraFiles,
    "lora-comfy": LoraComfy,
}

EXACT, ROUNDED = 1e-4, 0.1
"""The mean difference that pictures in 8 bits may have, in float32 and in bfloat16.

Of the built-in model's: computing in bfloat16 makes 0.002, rounding all trained weights to it 0.03, padding prompts to
512 tokens instead of 16 makes 0.15, other prompts make 0.26.
"""

Read = TypeVar("Read")


def export(
    config: str,
    output: str,
    ckpt_path: str = "last",
    format: Literal["diffusers", "single-file", "lora", "lora-comfy"] = "diffusers",
    weights: Kind = "ema",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    check: bool = True,
    device: str = "auto",
    push_to_hub: str | None = None,
    private: bool = True,
) -> None:
    """Write a checkpoint as a diffusers transformer, a single file for ComfyUI, or LoRA files, with a model card.

    Args:
        config: The run's own config.yaml.
        output: Folder to write.
        ckpt_path: Checkpoint: last, best (in checkpoint.monitor), or the path of one, sharded or not.
        format: Form of what is written. diffusers is a folder for `from_pretrained`. single-file is a safetensors
            file with the names of the model's first publication, for ComfyUI. lora and lora-comfy are an adapter's
            own weights, for `load_lora_weights` and for ComfyUI. The first two hold a trained adapter too.
        weights: Weights to write: the ema, or the policy.
        dtype: Dtype of the weights written.
        check: Whether to run the code of the model card and compare its picture of the first evaluation prompt with
            the checkpoint's own, of clips all frames. Both are written to `check/`. Takes the memory of sampling.
        device: Device that draws both pictures: auto, cuda or cpu; auto takes a GPU if there is one.
        push_to_hub: Name of a repository of the hub, such as me/my-model, that gets what is written, with its card but
            without `check/`; it is made if it is not there. The base model's licence counts there too.
        private: Whether a repository that is made is private.

    Raises:
        ValueError: naming the cure, if configuration, checkpoint and format do not fit together, or the check fails.
    """
    folder = Path(output).expanduser()
    if folder.exists():
        raise ValueError(f"{folder} exists already: name another output, or delete it")
    chosen = chosen_device(device) if check else "cpu"
    settings = read_config(config)
    run = RunFolder.of_config(config, settings.trainer.default_root_dir)
    checkpoint = whole_checkpoint(run, ckpt_path, settings)
    module = exported_module(settings)
    policy = module.policy
    assert isinstance(policy, FlowPolicy)
    check_format(format, policy)
    if push_to_hub is not None:
        make_repository(push_to_hub, private=private)
    policy.transformer = policy.outline()
    trained = read_trained(checkpoint, weights, module)
    written = FORMATS[format](policy, policy.transformer, trained, getattr(torch, dtype), folder.name)
    data = if_there(lambda: new_data(settings, policy))
    evaluation = if_there(lambda: data.eval_prompts) if data else None
    prompt = evaluation[0] if evaluation else PROMPT
    length = policy.encoder(Encoding(settings.data.max_sequence_length)).text.max_sequence_length
    with complete_or_absent_folder(folder) as incomplete:
        written.write(incomplete)
        found = None
        if check:
            code = usage.python(written, module, incomplete, prompt, length)
            found = compare(written, settings, incomplete, code, prompt, torch.device(chosen))
            print(f"the picture of the card's code against the checkpoint's: {found}")
        code = usage.python(written, module, folder, prompt, length)
        trained_on = if_there(lambda: data.train_prompts) if data else None
        exported = Export(folder, written, weights, checkpoint, run, trained_on, found, code)
        (incomplete / "README.md").write_text(card(exported, module), encoding="utf-8")
        shutil.copy(Path(config).expanduser(), incomplete / "config.yaml")
    print(f"{folder}: step {module.loaded_steps}, {weights}, {dtype}")
    if push_to_hub is not None:
        print(f"on the hub: {upload(folder, push_to_hub)}")


def check_format(name: str, policy: FlowPolicy) -> None:
    """Refuse a format that holds what the run has not trained.

    Raises:
        ValueError: naming those that do.
    """
    if name.startswith("lora") and policy.adapter is None:
        raise ValueError(
            f"the run trained the whole transformer, and there is no adapter that --format {name} could write: choose "
            "diffusers or single-file"
        )


def whole_checkpoint(run: RunFolder, ckpt_path: str, settings: Namespace) -> Path:
    """The checkpoint that is asked for.

    Raises:
        ValueError: naming the cure, if there is none, or it is damaged.
    """
    if ckpt_path in ("last", "best") and not run.checkpoints():
        raise ValueError(
            f"{run.path} holds no checkpoint: give the config.yaml of a run that has saved one, or --ckpt_path"
        )
    checkpoint = run.find_checkpoint(ckpt_path, settings.checkpoint.monitor, settings.checkpoint.mode)
    check_whole(checkpoint)
    return checkpoint


@torch.no_grad()
def compare(
    written: Format, settings: Namespace, folder: Path, code: str, prompt: str, device: torch.device
) -> Difference:
    """Draw a prompt with the checkpoint, and by the code of the model card from what was written, into `check/`.

    Raises:
        ValueError: if the code fails, or the pictures differ by more than rounding explains.
    """
    module = exported_module(settings)
    policy = module.policy
    assert isinstance(policy, FlowPolicy)
    policy.dtype = policy.vae_dtype = written.dtype
    policy.quantize_timesteps = False  # diffusers does not
    policy.compiles_blocks, policy.attention, policy.vae_tiling = False, None, False
    policy.load()
    for name, parameter in module.trainable_parameters():
        parameter.copy_(written.trained[name.removeprefix(PREFIX)].read())
    length = settings.data.max_sequence_length
    encoder = policy.encoder(Encoding(length, written.dtype, device)).text
    ours = own_frames(module, encoder, prompt, device)
    module.policy = None  # type: ignore[assignment]  # frees it
    del policy
    names = usage.run(code, device, written.given(folder))
    written.compare(names["pipe"])
    theirs = names["clip"] if "clip" in names else [names["picture"]]
    write_pictures(folder / "check", ours=ours, card=theirs)
    found = difference(ours, theirs, EXACT if written.dtype == torch.float32 else ROUNDED)
    if not found.mean <= found.allowed:
        raise ValueError(
            f"the picture that the card's code draws with {folder} is not the checkpoint's ({found}): look at "
            f"{folder / 'check'}; if they are alike, export with --dtype float32, or --check false"
        )
    return found


def exported_module(settings: Namespace) -> SRPOModule:
    """The run's module without weights; a base that was kept in 4 bits is taken as it was before.

    Raises:
        ValueError: if its policy is none that could be exported.
    """
    own = settings.clone()
    if own.model.policy.init_args.get("quantize"):
        own.model.policy.init_args.quantize = "none"
    module = new_module(own)
    if not isinstance(module.policy, FlowPolicy):
        raise ValueError(f"export writes transformers of diffusers, and model.policy is {type(module.policy).__name__}")
    return module


def if_there(read: Callable[[], Read]) -> Read | None:
    """What a run was trained on need not be there any more."""
    try:
        return read()
    except (ValueError, OSError):
        return None
