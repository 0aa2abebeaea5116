"""How good the moving world is: everything here is measured on what the assets folder holds."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer, UMT5EncoderModel, XCLIPModel

from srpo_lightning.evaluation.pictures import moving, write_clip
from srpo_lightning.files.pretrained import load_whole
from tools.emoji.augment import TEST
from tools.emoji.captions import STYLES, split
from tools.emoji.clip import text_features, token_ids
from tools.emoji.evaluate import percent, quality_table
from tools.emoji.tokenizers import MAX_TOKENS
from tools.emoji.world import World

from .captions import caption
from .motions import MOTIONS, NUM_FRAMES, SIZE_PX, clips, layers_of, poses
from .vae import mean_psnr
from .xclip import augmented, clip_features

SAMPLING_STEPS = 25
FRAME_MS = 90


class Critic:
    """An X-CLIP model that says which motion, style and concept it sees.

    Args:
        folder: one of the two X-CLIP folders of the assets.
        concepts: all concepts of the world.
    """

    def __init__(self, folder: Path, concepts: list[str]) -> None:
        self.model = load_whole(XCLIPModel, str(folder), dtype=torch.float32).eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        with torch.no_grad():
            self.texts = [
                text_features(self.model, token_ids(tokenizer, own)) for own in (list(MOTIONS), list(STYLES), concepts)
            ]

    @torch.no_grad()
    def similarities(self, shown: Tensor) -> list[Tensor]:
        """Cosines of clips [B, 3, F, 64, 64] in [0, 1] with the motions, the styles and the concepts."""
        features = torch.cat([clip_features(self.model, part) for part in shown.split(50)])
        return [features @ texts.T for texts in self.texts]

    def shares(self, shown: Tensor) -> list[float]:
        """Part of the clips that move in each way."""
        seen = self.similarities(shown)[0].argmax(1)
        return (torch.bincount(seen, minlength=len(MOTIONS)) / len(shown)).tolist()

    def accuracy(self, shown: Tensor, motion: Tensor, style: Tensor, concept: Tensor) -> tuple[float, ...]:
        """Parts of the clips with motion, style and concept right, and with the concept among the first five."""
        by_motion, by_style, by_concept = self.similarities(shown)
        first = by_concept.topk(5).indices == concept[:, None]
        right = (by_motion.argmax(1) == motion, by_style.argmax(1) == style, first[:, 0], first.any(1))
        return tuple(float(part.float().mean()) for part in right)


def read_pipeline(folder: Path) -> WanPipeline:
    """A pipeline folder in float32, without its progress bars."""
    name = str(folder)
    pipeline = WanPipeline.from_pretrained(
        name,
        transformer=load_whole(WanTransformer3DModel, name, "transformer", torch_dtype=torch.float32),
        vae=load_whole(AutoencoderKLWan, name, "vae", torch_dtype=torch.float32),
        text_encoder=load_whole(UMT5EncoderModel, name, "text_encoder", dtype=torch.float32),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: WanPipeline, prompts: list[str], guidance: float, seed: int) -> Tensor:
    """Sampled clips [B, 3, F, 64, 64] in [0, 1]; clip i depends on its prompt and on seed + i alone."""
    parts = []
    for start in range(0, len(prompts), 32):
        batch = prompts[start : start + 32]
        frames = pipeline(
            batch,
            height=SIZE_PX,
            width=SIZE_PX,
            num_frames=NUM_FRAMES,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))],
            max_sequence_length=MAX_TOKENS,
            output_type="pt",
        ).frames
        parts.append(frames.float().transpose(1, 2))
    return torch.cat(parts)


def moving_sheet(shown: Tensor, columns: int, file: Path) -> None:
    """Write clips [B, 3, F, H, W] in [0, 1] side by side into one animation."""
    rows = len(shown) // columns
    height, width = shown.shape[-2:]
    tiles = shown[: rows * columns].unflatten(0, (rows, columns)).permute(3, 0, 4, 1, 5, 2)
    pixels = (tiles.reshape(-1, rows * height, columns * width, 3) * 255).round().byte().numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_clip(file, moving([Image.fromarray(own) for own in pixels], frame_ms=FRAME_MS))


def critic_rows(name: str, critic: Critic, world: World) -> Iterable[tuple[str, str, str]]:
    """Accuracy on every picture once, freshly moved and on a fresh ground."""
    number = torch.Generator().manual_seed(1234)
    rows = torch.arange(len(world.concepts) * len(STYLES))
    motion = torch.randint(len(MOTIONS), (len(rows),), generator=number)
    shown = torch.cat(
        [
            augmented(layers_of(part, poses(own, number)), TEST, number)
            for part, own in zip(world.layers().split(100), motion.split(100), strict=True)
        ]
    )
    of_motion, of_style, top1, top5 = critic.accuracy(shown, motion, rows % len(STYLES), rows // len(STYLES))
    yield f"{name}: motion", percent(of_motion), ""
    yield f"{name}: style", percent(of_style), ""
    yield f"{name}: concept top-1 / top-5", percent(top1, top5), ""


def sample_rows(
    pipeline: WanPipeline, judge: Critic, concepts: list[str], guidance: float, sheets: Path
) -> Iterable[tuple[str, str, str]]:
    """What the judge sees in clips of held-out concepts: of whole prompts, and of prompts without a motion."""
    held_out = split(concepts)[1]
    rows = torch.arange(len(held_out)).repeat(len(STYLES))  # every concept in every style, with one motion
    concept = torch.tensor([concepts.index(own) for own in held_out])[rows]
    motion, style = rows % len(MOTIONS), (rows // 2 + torch.arange(len(rows)) // len(held_out)) % len(STYLES)
    named = zip(style.tolist(), rows.tolist(), motion.tolist(), strict=True)
    prompts = [caption(STYLES[s], held_out[row], MOTIONS[m]) for s, row, m in named]
    whole = draw(pipeline, prompts, guidance, 0)
    of_motion, of_style, top1, top5 = judge.accuracy(whole, motion, style, concept)
    yield f"whole prompts at guidance {guidance}: motion", percent(of_motion), ">= 85 %"
    yield f"whole prompts at guidance {guidance}: style", percent(of_style), ">= 75 %"
    yield f"whole prompts at guidance {guidance}: concept top-1 / top-5", percent(top1, top5), ""
    bare = draw(pipeline, held_out * 4, guidance, 1000)
    yield f"bare concepts at guidance {guidance}: {' / '.join(MOTIONS)}", percent(*judge.shares(bare)), "each 8 to 40 %"
    moving_sheet(whole[: len(held_out)], 8, sheets / f"whole-{guidance}.webp")
    moving_sheet(bare, 16, sheets / f"bare-{guidance}.webp")


def evaluate_assets(assets: Path, world: World, sheets: Path) -> str:
    """The table of quality, in Markdown; moving sheets go to `sheets`."""
    pipeline = read_pipeline(assets / "moving-wan")
    judge = Critic(assets / "moving-judge", world.concepts)
    number = torch.Generator().manual_seed(99)
    pictures = torch.randint(len(world.layers()), (200,), generator=number)
    shown = clips(world.layers()[pictures], poses(torch.arange(200) % len(MOTIONS), number))
    rows = [("autoencoder: PSNR of clips", f"{mean_psnr(pipeline.vae, shown):.1f} dB", "")]
    rows += critic_rows("reward", Critic(assets / "moving-xclip", world.concepts), world)
    rows += critic_rows("judge", judge, world)
    for guidance in (1.0, 2.0, 3.5):
        rows += sample_rows(pipeline, judge, world.concepts, guidance, sheets)
    return quality_table(rows)
