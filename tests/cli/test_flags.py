"""The project's own flags, frozen: a new one is a decision, and so is one that goes."""

import inspect

from jsonargparse import ArgumentParser

from srpo_lightning.callbacks import EMA, OverOptimizationGuard, Report, RewardTracking, RunCheckpoint, SampleLogger
from srpo_lightning.callbacks.predictions import Predictions
from srpo_lightning.data import PromptData
from srpo_lightning.data.prompts import Source
from srpo_lightning.jobs.export.job import export
from srpo_lightning.module import SRPOModule
from srpo_lightning.objectives import (
    GRPO,
    SRPO,
    ControlWords,
    DanceDiffusion,
    DirectAlign,
    DRaFT,
    DRTune,
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    FlowDiffusion,
    LeapAlign,
    Plain,
    ReFL,
    Relative,
)
from srpo_lightning.policies import FluxPolicy, Lora
from srpo_lightning.rewards import (
    SGPHPS,
    AestheticV25,
    ClipReward,
    HPSv2,
    HPSv3,
    ImageReward,
    LaionAesthetic,
    Motion,
    PickScore,
    Term,
    VideoAlignReward,
    WeightedReward,
    XClipReward,
)
from srpo_lightning.training.strategies import ReplicatedStrategy, ShardedStrategy

COMMON = "guidance shift shared_noise reward_batch_size"
GRADIENT = f"form {COMMON} num_steps margin"
FLAGS = {
    SRPOModule: "policy reward objective optimizer lr_scheduler num_sample_steps sample_guidance seed "
    "max_skipped_steps optimizer_in_backward clip_norm_per_parameter updates_per_rollout",
    PromptData: "train encoder evaluation validation_fraction images offline_ratio picture_latents batch_size "
    "repeats eval_batch_size "
    "num_eval_prompts eval_samples_per_prompt sizes cache_dir mirror_dir mirror_gigabytes "
    "max_picture_megapixels max_picture_megabytes max_prompts_to_encode "
    "max_sequence_length text_dtype text_quantize text_batch_size text_device shuffle_window num_workers seed",
    Source: "path weight prompt image seed negative_prompt tags width height split",
    RunCheckpoint: "every_n_steps keep monitor mode keep_best every_n_minutes",
    SRPO: f"control_words {COMMON} num_rollout_steps rollout_guidance num_schedule_steps window grid_size "
    "ground_truth_ratio edge denoise_lambda inversion_lambda margin position_per_sample word_choice template others",
    ControlWords: "positive negative",
    Plain: "template",
    Relative: "control_words word_choice template others extra_weight",
    DirectAlign: f"form {COMMON} inversion num_rollout_steps rollout_guidance num_schedule_steps window grid_size "
    "ground_truth_ratio edge denoise_lambda inversion_lambda margin position_per_sample",
    ReFL: f"{GRADIENT} late_steps",
    DRaFT: f"{GRADIENT} num_trained_steps num_variants step_checkpointing",
    DRTune: f"{GRADIENT} num_trained_steps early_stop",
    LeapAlign: f"{GRADIENT} input_gradient min_distance",
    FlowBPSparse: f"{GRADIENT} num_trained_steps late_bias gradient_rescale",
    FlowBPBridge: f"{GRADIENT} num_trained_steps late_bias gradient_rescale input_gradient",
    FlowBPLagrange: f"{GRADIENT} input_gradient min_distance num_supports num_trained_supports support_gradient "
    "gradient_rescale concentration",
    GRPO: f"form {COMMON} num_steps diffusion group_size timestep_fraction clip_range max_advantage kl_weight "
    "split_groups",
    DanceDiffusion: "eta",
    FlowDiffusion: "a",
    FluxPolicy: "pretrained height width dtype vae_dtype gradient_checkpointing vae_checkpointing vae_tiling "
    "resolution_shift quantize_timesteps exact_conditioning adapter quantize quantize_dir compile attention "
    "rollout_cache transformer trained_guidance guidance_every guided_steps",
    Lora: "rank alpha target_modules dropout dora rslora seed pretrained",
    ClipReward: "pretrained processor logit_scale_divisor dtype cache_size",
    PickScore: "pretrained processor logit_scale_divisor clamp dtype cache_size",
    HPSv2: "pretrained filename processor fit logit_scale_divisor dtype cache_size",
    SGPHPS: "as_probability pretrained filename processor fit logit_scale_divisor dtype cache_size",
    ImageReward: "pretrained tokenizer dtype",
    LaionAesthetic: "head pretrained dtype",
    AestheticV25: "head pretrained dtype",
    HPSv3: "pretrained weights dtype gradient_checkpointing quantize",
    VideoAlignReward: "pretrained weights visual_quality motion_quality text_alignment frame_rate dtype "
    "gradient_checkpointing quantize",
    XClipReward: "pretrained processor logit_scale_divisor dtype cache_size",
    Motion: "target",
    WeightedReward: "terms",
    Term: "reward weight mean std plain",
    ShardedStrategy: "shard_size replicate_size cpu_offload reshard_after_forward timeout_minutes context_parallel",
    ReplicatedStrategy: "timeout_minutes context_parallel",
    EMA: "decay warmup every_n_steps dtype device evaluate",
    Predictions: "output",
    SampleLogger: "num_samples columns max_share",
    OverOptimizationGuard: "weights action patience min_diversity max_drift learning_rate_factor min_motion "
    "max_flicker min_consistency",
    RewardTracking: "judge labels candidates top_k metrics held_out form",
    Report: "num_columns scale",
    export: "config output ckpt_path format weights dtype check device push_to_hub private",
}


def flags(component) -> list[str]:
    parser = ArgumentParser()
    if inspect.isclass(component):
        return parser.add_class_arguments(component, as_group=False, sub_configs=True)
    return parser.add_function_arguments(component, sub_configs=True)


def test_the_flags_are_the_ones_that_were_decided_on():
    assert {component: flags(component) for component in FLAGS} == {
        component: names.split() for component, names in FLAGS.items()
    }
