"""The stages of the build, in order; each resumes where it was stopped and is skipped once its result exists."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import XCLIPModel

from srpo_lightning.config.shipped import ASSETS
from tools.emoji.augment import Augmentation
from tools.emoji.build import JUDGE_AUGMENTATION, replace
from tools.emoji.clip import save_clip
from tools.emoji.flux import SHIFT
from tools.emoji.tokenizers import new_t5_tokenizer
from tools.emoji.training import trained
from tools.emoji.world import build_world

from . import vae, wan
from .captions import Captions
from .motions import MOTIONS, clips, poses
from .xclip import XClipTraining, new_tokenizer, new_xclip

NUM_FOLDED = 100  # clips that the statistics of latents are taken from
NUM_POSES = 2  # clips of each thing in each style and motion that the clip model sees


class Steps(NamedTuple):
    """How long each stage trains.

    Attributes:
        frames: autoencoder on single frames.
        clips: autoencoder on clips.
        decoder: its decoder alone.
        reward: the reward X-CLIP.
        judge: the other X-CLIP.
        wan: transformer and UMT5.
    """

    frames: int = 2000
    clips: int = 1200
    decoder: int = 1600
    reward: int = 900
    judge: int = 1250
    wan: int = 11000


class Build:
    """Everything that the stages share.

    Args:
        work: folder of pictures, checkpoints and logs.
        assets: folder of the finished models.
        steps: length of each stage.
    """

    def __init__(self, work: Path, assets: Path, steps: Steps) -> None:
        self.work, self.assets, self.steps = work, assets, steps
        world = build_world(work / "icons", work / "world.npz")
        self.concepts, self.layers = world.concepts, world.layers()
        self.captions = Captions.of(self.concepts)
        self.clip_tokenizer = new_tokenizer(self.captions.texts[:-1])
        self.t5_tokenizer = new_t5_tokenizer(self.captions.texts[:-1])

    def first_vae(self) -> AutoencoderKLWan:
        """The whole autoencoder with the encoder at its final state, the decoder at its first."""
        model = vae.new_vae()
        stages = (("frames", self.steps.frames, True, 32, 1e-3), ("clips", self.steps.clips, False, 6, 1e-3))
        for seed, (name, steps, is_still, batch, lr) in enumerate(stages):
            model.load_state_dict(
                trained(
                    self.work,
                    name,
                    seed,
                    lambda: vae.VAETraining(model, self.layers, steps, seed, is_still, batch, lr),  # noqa: B023
                )
            )
        draw = torch.Generator().manual_seed(0)
        pictures = torch.randint(len(self.layers), (NUM_FOLDED,), generator=draw)
        return vae.fold(
            model.eval(), clips(self.layers[pictures], poses(torch.arange(NUM_FOLDED) % len(MOTIONS), draw))
        )

    def finished_vae(self) -> AutoencoderKLWan:
        """The finished autoencoder."""
        model = self.first_vae()
        training = partial(vae.DecoderTraining, model, self.layers, self.steps.decoder, seed=5)
        model.load_state_dict(trained(self.work, "decoder", 5, training))
        return model

    def all_clips(self, batch: int, seed: int) -> Iterable[Tensor]:
        """Clips of everything, in the order concept, style, motion, pose."""
        draw = torch.Generator().manual_seed(seed)
        for rows in torch.arange(len(self.layers) * len(MOTIONS) * NUM_POSES).split(batch):
            shown = rows // NUM_POSES
            yield clips(self.layers[shown // len(MOTIONS)], poses(shown % len(MOTIONS), draw))

    @torch.no_grad()
    def latents(self) -> Tensor:
        """Latents of all clips, [concept * style * motion * NUM_POSES, C, T, 8, 8] in half precision."""
        file = self.work / "latents.safetensors"
        if not file.exists():
            model = self.first_vae()
            with torch.autocast("cpu", torch.bfloat16):
                found = [vae.encode(model, part).bfloat16() for part in self.all_clips(20, seed=1)]
            save_file({"latents": torch.cat(found)}, file)
        return load_file(file)["latents"]

    def xclip(self, pictures: str, name: str, steps: int, seed: int, augmentation: Augmentation) -> XCLIPModel:
        """A finished X-CLIP, which began as one of the built-in CLIP models of pictures."""

        def new() -> XCLIPModel:
            return new_xclip(ASSETS / pictures, self.clip_tokenizer)

        def training() -> XClipTraining:
            return XClipTraining(new(), self.clip_tokenizer, self.layers, self.concepts, steps, seed, augmentation)

        model = new()
        model.load_state_dict(trained(self.work, name, seed, training))
        return model.eval()

    def reward(self) -> XCLIPModel:
        """The finished reward."""
        return self.xclip("emoji-clip", "reward", self.steps.reward, 2, Augmentation())

    def judge(self) -> XCLIPModel:
        """The finished judge."""
        return self.xclip("emoji-judge", "judge", self.steps.judge, 3, JUDGE_AUGMENTATION)

    def new_wan(self) -> wan.TextAndClip:
        """Untrained."""
        return wan.TextAndClip(wan.new_transformer(), wan.new_text_encoder(self.t5_tokenizer))

    def wan(self) -> wan.TextAndClip:
        """The finished transformer and UMT5."""
        net = self.new_wan()
        net.load_state_dict(
            trained(
                self.work,
                "wan",
                4,
                lambda: wan.WanTraining(
                    self.new_wan(),
                    self.latents(),
                    NUM_POSES,
                    self.captions,
                    self.t5_tokenizer,
                    self.steps.wan,
                    seed=4,
                ),
            )
        )
        return net

    def everything(self) -> None:
        """All stages, then the assets, each folder written beside its place first and then moved there."""
        autoencoder, net = self.finished_vae(), self.wan()
        for name, model in (("moving-xclip", self.reward()), ("moving-judge", self.judge())):
            replace(self.assets / name, lambda folder: save_clip(model, self.clip_tokenizer, folder))  # noqa: B023
        pipeline = WanPipeline(
            tokenizer=self.t5_tokenizer,
            text_encoder=net.text,
            vae=autoencoder,
            transformer=net.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        ).to(torch.bfloat16)
        replace(self.assets / "moving-wan", pipeline.save_pretrained)
