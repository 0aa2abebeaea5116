"""What VideoAlign asks of transformers 4.45.2, the version that it names: processor and Qwen2-VL, clip by clip."""

import sys

import torch

library = torch.library.Library("torchvision", "DEF")  # its compiled operators, which nothing here needs
for operator in ("nms", "qnms"):
    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torchvision.transforms import InterpolationMode  # noqa: E402
from torchvision.transforms.functional import resize  # noqa: E402
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor  # noqa: E402
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # noqa: E402


def new_model(base: str, state: dict[str, torch.Tensor], num_tokens: int) -> Qwen2VLForConditionalGeneration:
    """In float32, with rotary frequencies that were rounded to bfloat16."""
    config = Qwen2VLConfig.from_pretrained(base, vocab_size=num_tokens)
    model = Qwen2VLForConditionalGeneration(config).bfloat16().float().eval().requires_grad_(False)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"]
    assert unexpected == ["rm_head.weight"]
    return model


def read(processor: Qwen2VLProcessor, clip: torch.Tensor, words: str, max_pixels: int) -> dict[str, torch.Tensor]:
    size = smart_resize(*clip.shape[-2:], 28, 128 * 28 * 28, max_pixels)
    video = resize(clip, size, interpolation=InterpolationMode.BICUBIC, antialias=True).float()
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": words}]}]
    prompt = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return processor(text=[prompt], videos=[video], return_tensors="pt", videos_kwargs={"do_rescale": True})


def logits(model: Qwen2VLForConditionalGeneration, head: torch.Tensor, batch: dict, asked: list[int], **own):
    """What the head says at the special tokens, of embeddings that the language model is given alone."""
    tokens = batch["input_ids"]
    embeds = model.model.embed_tokens(tokens)
    of_video = (tokens == model.config.video_token_id).unsqueeze(-1).expand_as(embeds)
    features = model.visual(batch["pixel_values_videos"], grid_thw=batch["video_grid_thw"])
    embeds = embeds.masked_scatter(of_video, features)
    hidden = model.model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **own).last_hidden_state
    return (hidden @ head.T)[torch.isin(tokens, torch.tensor(asked))]


def main(source: str, target: str) -> None:
    inputs = torch.load(source, weights_only=True)
    processor = Qwen2VLProcessor.from_pretrained(inputs["base"], padding_side="right")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": inputs["special"]})
    asked = processor.tokenizer.convert_tokens_to_ids(inputs["special"])
    model = new_model(inputs["base"], inputs["state"], len(processor.tokenizer))
    head = inputs["state"]["rm_head.weight"]
    outputs: dict[str, list] = {name: [] for name in ("tokens", "pixels", "grid", "logits", "counted", "gradients")}
    outputs["awkward"] = [
        read(processor, inputs["clips"][0], words, inputs["max_pixels"])["input_ids"][0] for words in inputs["awkward"]
    ]
    for clip, words in zip(inputs["clips"], inputs["words"], strict=True):
        batch = read(processor, clip, words, inputs["max_pixels"])
        batch["pixel_values_videos"].requires_grad_()
        answers = logits(model, head, batch, asked)
        answers.sum().backward()
        places, _ = model.get_rope_index(
            batch["input_ids"], video_grid_thw=batch["video_grid_thw"], attention_mask=batch["attention_mask"]
        )
        with torch.no_grad():
            outputs["counted"].append(logits(model, head, batch, asked, position_ids=places))
        outputs["tokens"].append(batch["input_ids"][0])
        outputs["pixels"].append(batch["pixel_values_videos"].detach())
        outputs["grid"].append(batch["video_grid_thw"])
        outputs["logits"].append(answers.detach())
        outputs["gradients"].append(batch["pixel_values_videos"].grad)
    torch.save(outputs, target)


main(*sys.argv[1:])
