"""A small Qwen2-VL with random weights, in the form of the files that HPSv3 and VideoAlign are published as."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2VLConfig
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from srpo_lightning.rewards.hpsv3 import INSTRUCTION, QUESTION, HPSv3
from srpo_lightning.rewards.pixels import CLIP_MEAN, CLIP_STD
from srpo_lightning.rewards.qwen2_vl import Network
from srpo_lightning.rewards.video_align import REWARD_TOKENS

NAMES = """endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start
vision_end vision_pad image_pad video_pad"""
SPECIAL = [f"<|{name}|>" for name in NAMES.split()]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """Qwen's: bytes, and pairs that are frequent in the instruction. Returns the number of tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([INSTRUCTION, QUESTION], trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(tokenizer.token_to_id(t)): {"content": t, **flags} for t in SPECIAL},
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "unk_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32768,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return tokenizer.get_vocab_size()


def write_base(folder: Path) -> Path:
    """Qwen2-VL's folder, in the form of its hub page, without weights."""
    num_tokens = write_tokenizer(folder)
    ids = {token: num_tokens - len(SPECIAL) + i for i, token in enumerate(SPECIAL)}
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "hidden_size": 32,
        "mlp_ratio": 2,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": num_tokens + 7,  # as the published one, more than there are tokens
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(config))
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def with_noise(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter += spread * torch.randn_like(parameter)
    return model


def write_weights(base: Path, path: Path) -> Path:
    """HPSv3's: random ones, in the form of the published file."""
    torch.manual_seed(0)
    config = Qwen2VLConfig.from_pretrained(base)
    network = with_noise(Network(config, HPSv3(str(base)).new_head(config.text_config.hidden_size)))
    state = {
        name: tensor if name.startswith("rm_head.") else tensor.bfloat16()
        for name, tensor in network.state_dict().items()
    }
    words = config.text_config.vocab_size - 6  # there are seven spare ones, and one is added
    embeddings = state["model.embed_tokens.weight"][:words].clone()
    save_file(state | {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings.clone()}, path)
    return path


def settings(output_dim: int = 1, **lora: Any) -> dict[str, Any]:
    """What model_config.json says, where it is read or checked."""
    return {
        "data_config": {
            "max_frame_pixels": 200704,
            "num_frames": None,
            "fps": 2.0,
            "eval_dim": ["VQ", "MQ", "TA"],
            "prompt_template_type": "detailed_special",
            "sample_type": "uniform",
        },
        "model_config": {"output_dim": output_dim, "use_special_tokens": True, "reward_token": "special"},
        "peft_lora_config": {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "use_rslora": False} | lora,
        "inference_config": {
            "VQ_mean": 3.6757,
            "VQ_std": 2.2476,
            "MQ_mean": 1.1646,
            "MQ_std": 1.3811,
            "TA_mean": 2.8105,
            "TA_std": 2.5121,
        },
    }


def write_video_reward(base: Path, folder: Path, output_dim: int = 1, **lora: Any) -> nn.Module:
    """A folder in the form of VideoAlign's published one, with random weights; returns the model as peft has it."""
    torch.manual_seed(0)
    config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size += len(REWARD_TOKENS) - 7  # there are seven spare ones, and three are added
    head = nn.Linear(config.text_config.hidden_size, output_dim, bias=False)
    network = Network(config, head)
    adapted = [name for name, own in network.model.named_modules() if isinstance(own, nn.Linear)]
    written = settings(output_dim, **lora)
    own = written["peft_lora_config"]
    targets = LoraConfig(
        r=own["lora_r"],
        lora_alpha=own["lora_alpha"],
        use_rslora=own["use_rslora"],
        lora_dropout=0.05,
        target_modules=[f"model.{name}" for name in adapted],
    )
    wrapped = with_noise(get_peft_model(network, targets)).eval().bfloat16()
    for name, parameter in wrapped.named_parameters():
        parameter.data *= 0.1 if ".lora_B." in name else 1  # as after training: small beside what it is added to
    checkpoint = folder / "checkpoint-11352"
    checkpoint.mkdir(parents=True)
    (folder / "model_config.json").write_text(json.dumps(written))
    embeddings = network.model.embed_tokens.weight
    state = wrapped.state_dict() | {"base_model.model.lm_head.weight": embeddings.clone()}
    torch.save(state, checkpoint / "model.pth")
    return wrapped.float()


def check_columns_share_the_vision_tower(reward: Any, seen: torch.Tensor, columns: list[list[str]]) -> None:
    """Scores under several texts are those of one call each, with one pass of what sees."""
    calls: list[int] = []
    hook = reward.network.visual.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        scores = reward.scores(seen, columns)
        assert len(calls) == 1
        hook.remove()
        expected = torch.stack([reward(seen, column) for column in columns], dim=1)
    assert torch.equal(scores, expected)
    assert scores.dtype == torch.float32


def check_scored_alone_as_together(reward: Any, seen: torch.Tensor, texts: list[str], least: float) -> None:
    """A score does not depend on what else is in the batch; scores differ by `least` at least (their deviation)."""
    with torch.no_grad():
        together = reward(seen, texts)
        alone = torch.cat([reward(own[None], [text]) for own, text in zip(seen, texts, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert together.std() > least
