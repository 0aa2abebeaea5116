"""How good the finished models are: everything here is measured on what the assets folder holds."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, T5EncoderModel

from srpo_lightning.files.pretrained import load_whole

from . import vae
from .augment import TEST, augment
from .captions import STYLES, caption
from .clip import image_features, text_features, token_ids
from .tokenizers import MAX_TOKENS
from .world import World

SAMPLING_STEPS = 25


class Critic:
    """A CLIP model that says which style and which concept it sees.

    Args:
        folder: one of the two CLIP folders of the assets.
        concepts: all concepts of the world.
    """

    def __init__(self, folder: Path, concepts: list[str]) -> None:
        self.clip = load_whole(CLIPModel, str(folder), dtype=torch.float32).eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        with torch.no_grad():
            self.styles = text_features(self.clip, token_ids(tokenizer, list(STYLES)))
            self.concepts = text_features(self.clip, token_ids(tokenizer, concepts))

    @torch.no_grad()
    def similarities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of images [B, 3, 64, 64] in [0, 1] with the styles [B, S] and with the concepts [B, C]."""
        features = torch.cat([image_features(self.clip, part) for part in images.split(100)])
        return features @ self.styles.T, features @ self.concepts.T

    def style_shares(self, images: Tensor) -> list[float]:
        """Part of the images that look like each style."""
        seen = self.similarities(images)[0].argmax(1)
        return (torch.bincount(seen, minlength=len(STYLES)) / len(images)).tolist()

    def accuracy(self, images: Tensor, style: Tensor, concept: Tensor) -> tuple[float, float, float]:
        """Style right, concept right, concept among the first five."""
        by_style, by_concept = self.similarities(images)
        first = by_concept.topk(5).indices == concept[:, None]
        right = (by_style.argmax(1) == style, first[:, 0], first.any(1))
        return tuple(float(part.float().mean()) for part in right)  # type: ignore[return-value]  # three of them


@torch.no_grad()
def mean_psnr(autoencoder: AutoencoderKL, images: Tensor) -> float:
    """Mean over the pictures of the PSNR in dB after encoding and decoding."""
    error = (vae.decode(autoencoder, vae.encode(autoencoder, images)) - images).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def read_pipeline(folder: Path) -> FluxPipeline:
    """A pipeline folder in float32, without its progress bars."""
    name = str(folder)
    pipeline = FluxPipeline.from_pretrained(
        name,
        transformer=load_whole(FluxTransformer2DModel, name, "transformer", torch_dtype=torch.float32),
        vae=load_whole(AutoencoderKL, name, "vae", torch_dtype=torch.float32),
        text_encoder=load_whole(CLIPTextModel, name, "text_encoder", dtype=torch.float32),
        text_encoder_2=load_whole(T5EncoderModel, name, "text_encoder_2", dtype=torch.float32),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: FluxPipeline, prompts: list[str], guidance: float, seed: int) -> Tensor:
    """Sampled images [B, 3, 64, 64] in [0, 1]; picture i depends on its prompt and on seed + i alone."""
    parts = []
    for start in range(0, len(prompts), 64):
        batch = prompts[start : start + 64]
        draws = [torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))]
        parts.append(
            pipeline(
                batch,
                height=64,
                width=64,
                num_inference_steps=SAMPLING_STEPS,
                guidance_scale=guidance,
                generator=draws,
                max_sequence_length=MAX_TOKENS,
                output_type="pt",
            ).images.float()
        )
    return torch.cat(parts)


def sheet(images: Tensor, columns: int, file: Path) -> None:
    """Write images [B, 3, H, W] in [0, 1] side by side into one PNG."""
    rows = len(images) // columns
    height, width = images.shape[-2:]
    tiles = images[: rows * columns].view(rows, columns, 3, height, width)
    pixels = (tiles.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3) * 255).round().byte()
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(file)


def percent(*parts: float) -> str:
    """Fractions as percentages with one decimal."""
    return " / ".join(f"{100 * part:.1f}" for part in parts) + " %"


def quality_table(rows: Iterable[tuple[str, str, str]]) -> str:
    """What was measured, its value and what was wanted, in Markdown."""
    lines = ["| measured | value | wanted |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} | {wanted} |" for name, value, wanted in rows])


def critic_rows(name: str, critic: Critic, world: World) -> Iterable[tuple[str, str, str]]:
    """Accuracy on every picture once, freshly moved and on a fresh ground."""
    count = len(world.concepts) * len(STYLES)
    rows = torch.arange(count)
    images = augment(world.layers(), TEST, torch.Generator().manual_seed(1234))
    style, top1, top5 = critic.accuracy(images, rows % len(STYLES), rows // len(STYLES))
    yield f"{name}: style", percent(style), ">= 95 %"
    yield f"{name}: concept top-1 / top-5", percent(top1, top5), "top-5 >= 85 %"


def sample_rows(
    pipeline: FluxPipeline, judge: Critic, concepts: list[str], guidance: float, sheets: Path
) -> Iterable[tuple[str, str, str]]:
    """What the judge sees in sampled pictures, one for each concept with a style word and one without."""
    concept = torch.arange(len(concepts))
    style = concept % len(STYLES)
    joint = draw(pipeline, [caption(STYLES[s], c) for s, c in zip(style.tolist(), concepts, strict=True)], guidance, 0)
    right, top1, top5 = judge.accuracy(joint, style, concept)
    yield f'"style. concept" at guidance {guidance}: style', percent(right), ">= 85 %"
    yield f'"style. concept" at guidance {guidance}: concept top-1 / top-5', percent(top1, top5), "top-5 >= 70 %"
    bare = draw(pipeline, concepts, guidance, 1000)
    _, top1, top5 = judge.accuracy(bare, style, concept)
    shares = percent(*judge.style_shares(bare))
    yield f'"concept" at guidance {guidance}: {" / ".join(STYLES)}', shares, "each 8 to 40 %"
    yield f'"concept" at guidance {guidance}: concept top-1 / top-5', percent(top1, top5), ""
    sheet(joint, 20, sheets / f"joint-{guidance}.png")
    sheet(bare, 20, sheets / f"bare-{guidance}.png")


def evaluate_assets(assets: Path, world: World, sheets: Path) -> str:
    """The table of quality, in Markdown; sample sheets go to `sheets`."""
    pipeline = read_pipeline(assets / "emoji-flux")
    judge = Critic(assets / "emoji-judge", world.concepts)
    rows = [("VAE: PSNR", f"{mean_psnr(pipeline.vae, world.images()):.1f} dB", ">= 27 dB")]
    rows += critic_rows("reward", Critic(assets / "emoji-clip", world.concepts), world)
    rows += critic_rows("judge", judge, world)
    for guidance in (3.5, 2.0, 1.0):
        rows += sample_rows(pipeline, judge, world.concepts, guidance, sheets)
    return quality_table(rows)
