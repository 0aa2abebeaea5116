"""Models with random weights in the layouts of real ones, small enough that a training step takes milliseconds."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from srpo_lightning.batch import Conditions, Text
from srpo_lightning.data import PromptData
from srpo_lightning.encoding import Encoder, Encoding
from srpo_lightning.files.checkpoints import AtomicCheckpointIO
from srpo_lightning.files.quiet import QUIET
from srpo_lightning.module import SRPOModule
from srpo_lightning.objectives import SRPO, ControlWords
from srpo_lightning.policies import FluxPolicy
from srpo_lightning.policies.image_encoder import VAEEncoder
from srpo_lightning.rewards import ClipReward

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-"
MAX_TOKENS = 12
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    "vocab_size": 3 + 2 * len(CHARACTERS),
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def clip_tokenizer() -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", "!", *CHARACTERS, *(c + "</w>" for c in CHARACTERS)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=MAX_TOKENS)


def t5_tokenizer() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *CHARACTERS]
    return T5TokenizerFast(vocab=[(p, -1.0) for p in pieces], extra_ids=0, model_max_length=MAX_TOKENS)


def kl_vae(**changes: Any) -> AutoencoderKL:
    """For 16 x 16 pictures and up, factor 8 as FLUX's."""
    size = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "scaling_factor": 0.7,
        "shift_factor": 0.1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**size | changes)


def t5_encoder(width: int = 16) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def write_pipeline(folder: Path, seed: int = 0, guidance_embeds: bool = True, width: int = 16) -> Path:
    """A FluxPipeline for 16 x 16 pictures and up."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=width // 8,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    vae, t5 = kl_vae(), t5_encoder()
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def write_clip(folder: Path, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = CLIPConfig(
        text_config=CLIPTextConfig(**TEXT).to_dict(), vision_config=CLIPVisionConfig(**vision).to_dict()
    )
    config.projection_dim = 16
    CLIPModel(config).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    size = {"height": 16, "width": 16}
    preprocessor = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def write_prompts(folder: Path) -> tuple[Path, Path]:
    train, evaluation = folder / "train.txt", folder / "eval.txt"
    train.write_text("\n".join(f"a{i} b" for i in range(7)))
    evaluation.write_text("\n".join(f"c{i}" for i in range(3)))
    return train, evaluation


class Models(NamedTuple):
    """Where everything is that a run reads."""

    pipeline: Path
    clip: Path
    judge: Path
    train: Path
    evaluation: Path


def write_models(folder: Path) -> Models:
    pipeline = write_pipeline(folder / "flux")
    return Models(pipeline, write_clip(folder / "clip"), write_clip(folder / "judge", seed=2), *write_prompts(folder))


def new_policy(models: Models, **settings: Any) -> FluxPolicy:
    policy = FluxPolicy(str(models.pipeline), **{"height": 32, "width": 32} | settings)
    policy.load()
    return policy


def encoder_of(models: Models) -> Callable[[Encoding], Encoder]:
    return FluxPolicy(str(models.pipeline), 32, 32).encoder


def image_encoder(folder: Path, draws: bool = False) -> VAEEncoder:
    encoder = FluxPolicy(str(folder), 32, 32).encoder(Encoding(draws=draws))
    assert encoder.images is not None
    return encoder.images()


def new_reward(folder: Path, **settings: Any) -> ClipReward:
    reward = ClipReward(str(folder), **settings)
    reward.load()
    return reward


def new_conditions(batch_size: int, dtype: torch.dtype = torch.float32) -> Conditions:
    """Random features, a function of the batch size: no text encoder is run."""
    draw = torch.Generator().manual_seed(batch_size)
    return Conditions(
        [f"a{i} b" for i in range(batch_size)],
        Text(
            {
                "prompt_embeds": torch.randn(batch_size, MAX_TOKENS, 16, generator=draw, dtype=dtype),
                "pooled_prompt_embeds": torch.randn(batch_size, 16, generator=draw, dtype=dtype),
            }
        ),
        torch.arange(batch_size),
    )


def new_module(models: Models, reward: ClipReward | None = None, **settings: Any) -> SRPOModule:
    return SRPOModule(
        FluxPolicy(str(models.pipeline), 32, 32),
        reward or ClipReward(str(models.clip)),
        SRPO(ControlWords(["x", "y"], ["z"]), num_rollout_steps=2),
        **{"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-3), "num_sample_steps": 2, "seed": 3} | settings,
    )


def new_trainer(run: Path, callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
    """The command line's trainer, without a logger and without validation."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    defaults = {
        "default_root_dir": run,
        "max_steps": 4,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 0,
        "gradient_clip_val": 0.1,
        "use_distributed_sampler": False,
        "plugins": [AtomicCheckpointIO()],
    }
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    return Trainer(**defaults | {"callbacks": list(callbacks), "enable_checkpointing": saves} | settings)


def new_data(models: Models, cache: Path, **settings: Any) -> PromptData:
    defaults = {"batch_size": 2, "eval_batch_size": 2, "cache_dir": str(cache), "seed": 3}
    return PromptData(str(models.train), encoder_of(models), str(models.evaluation), **defaults | settings)


def config(models: Models, run: Path, cache: Path) -> dict[str, Any]:
    """A whole run of four steps, as a configuration file holds it."""
    clip, judge = (
        {"class_path": "srpo_lightning.rewards.ClipReward", "init_args": {"pretrained": str(path)}}
        for path in (models.clip, models.judge)
    )
    policy = {"pretrained": str(models.pipeline), "height": 32, "width": 32}
    objective = {"control_words": {"positive": ["x", "y"], "negative": ["z"]}, "num_rollout_steps": 2}
    labels = {"judge": judge, "labels": ["x", "z"], "candidates": [str(models.evaluation)], "top_k": 1}
    return {
        "seed_everything": 3,
        "default_callbacks": False,  # what is tested is named
        "model": {
            "policy": {"class_path": "srpo_lightning.policies.FluxPolicy", "init_args": policy},
            "reward": clip,
            "objective": {"class_path": "srpo_lightning.objectives.SRPO", "init_args": objective},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "num_sample_steps": 2,
        },
        "data": {
            "train": str(models.train),
            "evaluation": str(models.evaluation),
            "batch_size": 2,
            "eval_batch_size": 2,
            "cache_dir": str(cache),
        },
        "checkpoint": {"every_n_steps": 2},
        "trainer": {
            "default_root_dir": str(run),
            "max_steps": 4,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": -1,
            "check_val_every_n_epoch": None,
            "val_check_interval": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "srpo_lightning.callbacks.EMA", "init_args": {"decay": 0.9}},
                {"class_path": "srpo_lightning.callbacks.SampleLogger", "init_args": {"max_share": 1.0}},
                {"class_path": "srpo_lightning.callbacks.RewardTracking", "init_args": labels},
                {"class_path": "srpo_lightning.callbacks.Report"},
            ],
        },
    }


def write_config(models: Models, run: Path, cache: Path) -> Path:
    """The configuration as a file beside the run folder; YAML reads JSON."""
    path = run.with_suffix(".yaml")
    path.write_text(json.dumps(config(models, run, cache)))
    return path
