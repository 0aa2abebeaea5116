"""The stages of the build, in order; each resumes where it was stopped and is skipped once its result exists."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel

from . import flux, vae
from .augment import Augmentation
from .captions import write_prompts
from .clip import JUDGE, REWARD, CLIPTraining, Size, new_clip, save_clip
from .tokenizers import new_clip_tokenizer, new_t5_tokenizer
from .training import trained
from .world import World, build_world

# The judge sees other distortions than the reward, so that the two do not share their blind spots.
JUDGE_AUGMENTATION = Augmentation(shift_px=8, smallest=0.7, tilt=0.1, grounded=0.4, blurred=0.4, noise=0.08, tint=0.15)


class Steps(NamedTuple):
    """How long each stage trains.

    Attributes:
        vae: encoder and decoder together.
        decoder: the decoder alone, afterwards.
        reward: the reward CLIP.
        judge: the other CLIP.
        flux: the transformer and T5 at guidance 1.
        distillation: guidance into the guidance embedding.
    """

    vae: int = 1400
    decoder: int = 2200
    reward: int = 1000
    judge: int = 1700
    flux: int = 4600
    distillation: int = 500


class Build:
    """Everything that the stages share: where the work files are, the world, the tokenizers.

    Args:
        work: folder of pictures, checkpoints and logs.
        assets: folder of the finished models.
    """

    def __init__(self, work: Path, assets: Path, steps: Steps) -> None:
        self.work, self.assets, self.steps = work, assets, steps
        self.world: World = build_world(work / "icons", work / "world.npz")
        self.table = flux.CaptionTable.of(self.world.concepts)
        self.clip_tokenizer = new_clip_tokenizer(self.table.captions[:-1])
        self.t5_tokenizer = new_t5_tokenizer(self.table.captions[:-1])

    def first_vae(self) -> AutoencoderKL:
        """The whole autoencoder with the encoder at its final state, the decoder at its first."""
        images = self.world.images()
        weights = trained(self.work, "vae", 0, lambda: vae.VAETraining(images, self.steps.vae, seed=0))
        model = vae.new_vae()
        model.load_state_dict(weights)
        return vae.fold(model.eval(), images)

    def finished_vae(self) -> AutoencoderKL:
        """The finished autoencoder."""
        model = self.first_vae()
        images = self.world.images()
        weights = trained(
            self.work, "decoder", 0, lambda: vae.DecoderTraining(images, model, self.steps.decoder, seed=1)
        )
        model.decoder.load_state_dict(weights)
        return model

    def _clip(self, size: Size, name: str, steps: int, seed: int, augmentation: Augmentation) -> CLIPModel:
        def trainee(clip: CLIPModel) -> CLIPTraining:
            return CLIPTraining(
                clip, self.clip_tokenizer, self.world.layers(), self.world.concepts, steps, seed, augmentation
            )

        weights = trained(self.work, name, seed, lambda: trainee(new_clip(size, self.clip_tokenizer)))
        clip = new_clip(size, self.clip_tokenizer)
        clip.load_state_dict(weights)
        return clip.eval()

    def reward(self) -> CLIPModel:
        """The reward; FLUX reads its text tower too."""
        return self._clip(REWARD, "reward", self.steps.reward, 1, Augmentation())

    def judge(self) -> CLIPModel:
        """The finished judge."""
        return self._clip(JUDGE, "judge", self.steps.judge, 3, JUDGE_AUGMENTATION)

    def text_tower(self) -> CLIPTextModel:
        """The reward's text tower as FLUX's first text encoder."""
        clip = self.reward()
        tower = CLIPTextModel(clip.config.text_config)
        tower.load_state_dict(clip.text_model.state_dict())
        return tower.eval()

    def prompts(self) -> flux.Prompts:
        """All captions, encoded."""
        return flux.read_prompts(self.table.captions, self.t5_tokenizer, self.clip_tokenizer, self.text_tower())

    def latents(self) -> Tensor:
        """Packed latents of all pictures."""
        return flux.pack(vae.encode(self.first_vae(), self.world.images()))

    def new_flux(self) -> flux.TextAndPicture:
        """Untrained."""
        return flux.TextAndPicture(flux.new_transformer(REWARD.text_width), flux.new_t5(self.t5_tokenizer))

    def plain_flux(self) -> flux.TextAndPicture:
        """The transformer and T5 before distillation."""
        weights = trained(
            self.work,
            "flux",
            4,
            lambda: flux.FluxTraining(
                self.new_flux(), self.latents(), self.prompts(), self.table, self.steps.flux, seed=4
            ),
        )
        net = self.new_flux()
        net.load_state_dict(weights)
        return net

    def guided_flux(self) -> flux.TextAndPicture:
        """The finished transformer and T5."""
        net = self.plain_flux()
        weights = trained(
            self.work,
            "distillation",
            5,
            lambda: flux.GuidanceDistillation(
                net, self.latents(), self.prompts(), self.table, self.steps.distillation, seed=5
            ),
        )
        net = self.new_flux()
        net.load_state_dict(weights)
        return net

    def everything(self) -> None:
        """All stages, then the assets."""
        autoencoder, reward, judge = self.finished_vae(), self.reward(), self.judge()
        self.export(self.guided_flux(), autoencoder, reward, judge)

    def export(self, net: flux.TextAndPicture, autoencoder: AutoencoderKL, reward: CLIPModel, judge: CLIPModel) -> None:
        """Write the asset folders, each beside its place first and then moved there."""
        write_prompts(self.assets / "prompts", self.world.concepts)
        replace(self.assets / "emoji-clip", lambda folder: save_clip(reward, self.clip_tokenizer, folder))
        replace(self.assets / "emoji-judge", lambda folder: save_clip(judge, self.clip_tokenizer, folder))
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=flux.SHIFT, use_dynamic_shifting=False),
            vae=autoencoder,
            text_encoder=self.text_tower(),
            tokenizer=self.clip_tokenizer,
            text_encoder_2=net.t5,
            tokenizer_2=self.t5_tokenizer,
            transformer=net.transformer,
        ).to(torch.bfloat16)
        replace(self.assets / "emoji-flux", pipeline.save_pretrained)


def replace(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder so that nobody ever finds half of it."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(fresh)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
