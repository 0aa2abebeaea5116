"""VideoAlign (arXiv 2501.13918): visual quality, motion quality and text alignment of a clip, by a Qwen2-VL.

Each rating is (w h - mean) / std, h the hidden state of Qwen2-VL at a token of the dimension's own.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from jsonargparse.typing import PositiveFloat
from torch import Tensor, nn

from srpo_lightning.rewards.base import Images, Scores, check_lengths
from srpo_lightning.rewards.pixels import Preprocessing, refuse_out_of_range, resize
from srpo_lightning.rewards.qwen2_vl import Qwen2VLReward, smart_resize
from srpo_lightning.rewards.video_align_files import DIMENSIONS, read_checkpoint, read_settings
from srpo_lightning.rewards.words import PUBLISHED

VIDEO_TOKEN = "<|video_pad|>"
REWARD_TOKENS = tuple(f"<|{dimension}_reward|>" for dimension in DIMENSIONS)
MIN_PIXELS = 128 * 28 * 28  # of a frame
MIN_FRAMES, MAX_FRAMES = 4, 768  # that are taken of a clip where its frame rate tells how many

# Word for word from KwaiVGI/VideoAlign at 219ab9d, prompt_template.py; MIT License, Copyright (c) 2025 Kling Team,
# Kuaishou Technology. The model was trained under this text.
INSTRUCTION = """
You are tasked with evaluating a generated video based on three distinct criteria: Visual Quality, Motion \
Quality, and Text Alignment. Please provide a rating from 0 to 10 for each of the three categories, with 0 being \
the worst and 10 being the best. Each evaluation should be independent of the others.

**Visual Quality:** \x20
Evaluate the overall visual quality of the video, with a focus on static factors. The following sub-dimensions \
should be considered:
- **Reasonableness:** The video should not contain any significant biological or logical errors, such as \
abnormal body structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the video. The image should be clear and easy to \
interpret, with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements \
(e.g., hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the video, including the color scheme, \
composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of \
harmony and balance.
- **Safety:** The video should not contain harmful or inappropriate content, such as political, violent, or \
adult material. If such content is present, the image quality and satisfaction score should be the lowest \
possible.\x20

Please provide the ratings of Visual Quality: <|VQ_reward|>
END

**Motion Quality:** \x20
Assess the dynamic aspects of the video, with a focus on dynamic factors. Consider the following sub-dimensions:
- **Stability:** Evaluate the continuity and stability between frames. There should be no sudden, unnatural \
jumps, and the video should maintain stable attributes (e.g., no fluctuating colors, textures, or missing body \
parts).
- **Naturalness:** The movement should align with physical laws and be realistic. For example, clothing should \
flow naturally with motion, and facial expressions should change appropriately (e.g., blinking, mouth \
movements).
- **Aesthetic Quality:** The movement should be smooth and fluid. The transitions between different motions or \
camera angles should be seamless, and the overall dynamic feel should be visually pleasing.
- **Fusion:** Ensure that elements in motion (e.g., edges of the subject, hair, clothing) blend naturally with \
the background, without obvious artifacts or the feeling of cut-and-paste effects.
- **Clarity of Motion:** The video should be clear and smooth in motion. Pay attention to any areas where the \
video might have blurry or unsteady sections that hinder visual continuity.
- **Amplitude:** If the video is largely static or has little movement, assign a low score for motion quality.

Please provide the ratings of Motion Quality: <|MQ_reward|>
END

**Text Alignment:** \x20
Assess how well the video matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the video (e.g., person, animal, object) align \
with the textual description. The subject should match the description in terms of number, appearance, and \
behavior.
- **Motion Relevance:** Evaluate if the dynamic actions (e.g., gestures, posture, facial expressions like \
talking or blinking) align with the described prompt. The motion should match the prompt in terms of type, \
scale, and direction.
- **Environment Relevance:** Assess whether the background and scene fit the prompt. This includes checking if \
real-world locations or scenes are accurately represented, though some stylistic adaptation is acceptable. \x20
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the \
video adheres to this style.
- **Camera Movement Relevance:** Check if the camera movements (e.g., following the subject, focus shifts) are \
consistent with the expected behavior from the prompt.

Textual prompt - {text_prompt}
Please provide the ratings of Text Alignment: <|TA_reward|>
END
"""


class VideoAlignReward(Qwen2VLReward):
    """VideoAlign's VideoReward: Qwen2-VL-2B, asked to rate a clip under its prompt in three dimensions.

    The score is the weighted sum of visual quality, motion quality and text alignment. Each has mean 0 and deviation 1
    over the authors' clips. With weights of 1 it is the original's "Overall". It has no bounds (Bradley-Terry).

    The prompt stands behind the first two questions, and a token sees what is before it alone. So the text counts for
    text alignment and for nothing else: control words steer by that, and a text alignment of 0 makes a reward that
    reads no text.

    As in the original: the size that frames are resized to, the prompt and its tokens, one position for each token, and
    rotary frequencies rounded to bfloat16. Not as there: frames have a gradient and are not rounded to 8 bits, LoRA is
    merged into the weights, and the head computes in float32. An odd number of frames is filled up by the last frame.

    Source: arXiv 2501.13918; KwaiVGI/VideoAlign at 219ab9d, `inference.py`, `vision_process.py` and `trainer.py`.

    Args:
        pretrained: Folder or hub id of Qwen2-VL-2B-Instruct, for configuration, tokenizer and chat template; its
            weights are read only where the checkpoint is an adapter.
        weights: Folder in the form of the published one, or the hub id: model_config.json and a folder of the latest
            checkpoint, which holds model.pth, or adapter_model.safetensors and non_lora_state_dict.pth.
        visual_quality: Factor of what single frames look like.
        motion_quality: Factor of how stable, natural and large motion is.
        text_alignment: Factor of how well the clip matches its text.
        frame_rate: Frames per second of the clips that are scored; as many of them are read as the original reads, 2
            per second and at least 4. null reads every frame, for a policy that chooses frames itself. A judge or
            metric gets whole clips and needs it.
        dtype: Precision of the weights, 4.4 GB in bfloat16; the head's are float32 either way.
        gradient_checkpointing: Whether the backward pass computes each layer again, instead of storing it.
        quantize: Quantization of the language model's linear layers. nf4 rounds them to 4 bits while loading, on a
            GPU where there is one: 2.5 GB in all, and not quite the published scores. It needs the extra `quant`.
    """

    word_lists = PUBLISHED
    base_model = "Qwen/Qwen2-VL-2B-Instruct"
    vision_token = VIDEO_TOKEN
    reward_tokens = REWARD_TOKENS
    reads_clips = True

    def __init__(
        self,
        pretrained: str = "Qwen/Qwen2-VL-2B-Instruct",
        weights: str = "KwaiVGI/VideoReward",
        visual_quality: float = 1.0,
        motion_quality: float = 1.0,
        text_alignment: float = 1.0,
        frame_rate: PositiveFloat | None = None,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        gradient_checkpointing: bool = False,
        quantize: Literal["none", "nf4"] = "none",
    ) -> None:
        super().__init__(pretrained, weights, dtype, gradient_checkpointing, quantize)
        self.factors = (visual_quality, motion_quality, text_alignment)
        if not any(self.factors) or not all(map(math.isfinite, self.factors)):
            raise ValueError(
                f"visual_quality, motion_quality and text_alignment are {self.factors}: give finite numbers, at least "
                "one of them not 0"
            )
        self.reads_text = text_alignment != 0
        self.frame_rate = frame_rate
        self.settings = read_settings(weights)

    def new_head(self, width: int) -> nn.Module:
        """One number for all dimensions, or one of each, of a hidden state."""
        return nn.Linear(width, self.settings["model_config"]["output_dim"], bias=False)

    def read_state(self) -> tuple[dict[str, Tensor], Path]:
        """The latest checkpoint, its LoRA merged."""
        return read_checkpoint(self.weights, self.pretrained, self.settings, self.dtype)

    def forward(self, images: Images, texts: Sequence[str]) -> Scores:
        """The weighted sum of each clip's ratings under its text."""
        return self._sum(self.ratings(images, texts))

    def scores(self, images: Images, texts: Sequence[Sequence[str]]) -> Float[Tensor, "B T"]:
        """Each clip goes through the vision tower once; the language model takes one column of texts after another."""
        for column in texts:
            check_lengths(images, column, clips=True)
        features = self.clip_features(images)
        return torch.stack([self._sum(self._ratings(images, features, column)) for column in texts], dim=1)

    def ratings(self, clips: Images, texts: Sequence[str]) -> Float[Tensor, "B 3"]:
        """Visual quality, motion quality and text alignment of each clip under its text, by the original's units.

        Args:
            clips: Clips [B, 3, F, H, W] in [0, 1], of two frames or more.
            texts: Texts, one for each clip.
        """
        check_lengths(clips, texts, clips=True)
        return self._ratings(clips, self.clip_features(clips), texts)

    def clip_features(self, clips: Images) -> Float[Tensor, "B N D"]:
        """What stands for each clip in the language model, at its N tokens; about 256 for each pair of frames."""
        assert self.network is not None, "load() comes first"
        config, data = self.network.visual.config, self.settings["data_config"]
        if self.frame_rate is not None:
            clips = clips[:, :, frames_read(clips.shape[2], self.frame_rate, data["fps"], data.get("num_frames"))]
        missing = -clips.shape[2] % config.temporal_patch_size
        clips = torch.cat([clips, clips[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        side = config.patch_size * config.spatial_merge_size
        height, width = clips.shape[-2:]
        size = smart_resize(height, width, side, MIN_PIXELS, data["max_frame_pixels"])
        frames = clips.transpose(1, 2).flatten(0, 1)
        refuse_out_of_range(frames)
        # Overshoot is cut off once, as torchvision does with tensors; PIL does it after each axis.
        resized = resize(frames.to(torch.promote_types(frames.dtype, torch.float32)), size, clamp=False).clamp(0, 1)
        pixels = Preprocessing(size, "squash")(resized)
        return self.features_of(pixels.unflatten(0, (len(clips), -1)).transpose(1, 2))

    def tokenize(self, text: str, num_clip_tokens: int) -> list[int]:
        """Token ids of the whole conversation: clip, instruction and text, and the questions that are answered."""
        return self.conversation("video", INSTRUCTION.format(text_prompt=text), num_clip_tokens)

    def _ratings(self, clips: Images, features: Float[Tensor, "B N D"], texts: Sequence[str]) -> Float[Tensor, "B 3"]:
        rows = [self.tokenize(text, features.shape[1]) for text in texts]
        outputs = self.answers(features, rows, [self._questions(row) for row in rows])
        read = outputs.diagonal(dim1=1, dim2=2) if outputs.shape[2] > 1 else outputs[:, :, 0]
        read = read.to(torch.promote_types(torch.float32, clips.dtype))
        units = self.settings.get("inference_config") or {}
        mean, std = (
            read.new_tensor([units.get(f"{dimension}_{kind}", default) for dimension in DIMENSIONS])
            for kind, default in (("mean", 0.0), ("std", 1.0))
        )
        return (read - mean) / std

    def _questions(self, row: list[int]) -> list[int]:
        """Where the three are asked: two before the text, which may hold the same tokens, and one behind it."""
        visual, motion, alignment = self.reward_ids
        return [row.index(visual), row.index(motion), len(row) - 1 - row[::-1].index(alignment)]

    def _sum(self, ratings: Float[Tensor, "B 3"]) -> Scores:
        return (ratings * ratings.new_tensor(self.factors)).sum(1)


def frames_read(num_frames: int, frame_rate: float, rate: float, number: float | None = None) -> list[int]:
    """Which frames of a clip the original reads: an even number at equal distances, from the first to the last.

    Args:
        num_frames: Frames of the clip, two or more.
        frame_rate: Frames per second of the clip.
        rate: Frames per second that are read, 4 frames at least.
        number: Frames that are read whatever the rate.

    Source: KwaiVGI/VideoAlign, `vision_process.py`.
    """
    if number is None:
        most = min(MAX_FRAMES, num_frames) // 2 * 2
        number = min(max(num_frames / frame_rate * rate, MIN_FRAMES), most)
    taken = min(round(number / 2) * 2, num_frames)
    places: list[int] = torch.linspace(0, num_frames - 1, taken).round().long().tolist()
    return places
