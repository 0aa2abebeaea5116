"""HPSv3's own code (package hpsv3, with the transformers it names) on a Qwen2-VL of few layers with random weights."""

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

# What scoring does not need: the trainer's packages, the compiled operators of torchvision.
UNUSED = {
    "datasets": (),
    "fire": (),
    "matplotlib": (),
    "matplotlib.pyplot": (),
    "matplotlib.patches": (),
    "pandas": (),
    "peft": ("LoraConfig", "PeftModel", "get_peft_model"),
    "trl": ("RewardTrainer", "get_kbit_device_map"),
}
for name, classes in UNUSED.items():
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update({each: type(each, (), {}) for each in classes})
    sys.modules[name] = module
sys.modules["trl"].get_quantization_config = lambda config: None
library = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import hpsv3.inference as published  # noqa: E402
from hpsv3.dataset.data_collator_qwen import INSTRUCTION, prompt_with_special_token  # noqa: E402
from hpsv3.dataset.utils import smart_resize  # noqa: E402
from hpsv3.model.differentiable_image_processor import Qwen2VLImageProcessor  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration  # noqa: E402

NUM_PIXELS = 256 * 28 * 28  # as in inference.py


def with_noise(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        spread = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data += spread * torch.randn_like(parameter)
    return model


def write_weights(base: Path, config: Path, weights: Path) -> None:
    """A Qwen2-VL, and what the package makes of it: its vocabulary, its special token, its head, its dtypes."""
    qwen = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(base))
    save_file(with_noise(qwen).state_dict(), base / "model.safetensors", {"format": "pt"})
    kinds = (published.DataConfig, published.TrainingConfig, published.ModelConfig, published.PEFTLoraConfig)
    (_, training, model, lora), _ = published.parse_args_with_yaml(kinds, str(config), is_train=False)
    network, _, _ = published.create_model_and_processor(model, lora, training)
    save_file(with_noise(network).state_dict(), weights)


def gradient(inferencer: published.HPSv3RewardInferencer, image: torch.Tensor, text: str) -> torch.Tensor:
    """With respect to the image in [0, 255]."""
    pixels = image.permute(2, 0, 1).float().requires_grad_()
    inferencer.reward([pixels], [text])[0, 0].backward()
    return pixels.grad


def main(source: str, target: str) -> None:
    inputs = torch.load(source, weights_only=True)
    torch.manual_seed(0)
    base, folder = Path(inputs["base"]), Path(target).parent
    config, weights = folder / "HPSv3_7B.yaml", folder / "HPSv3.safetensors"
    settings = OmegaConf.load(Path(published.__file__).with_name("config") / config.name)
    OmegaConf.save(OmegaConf.merge(settings, {"model_name_or_path": str(base), "output_dir": str(folder)}), config)
    write_weights(base, config, weights)
    inferencer = published.HPSv3RewardInferencer(str(config), str(weights), device="cpu")
    images = [Image.fromarray(image.numpy()) for image in inputs["images"]]
    texts = inputs["texts"]

    def score() -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([inferencer.reward([image] * len(texts), texts) for image in images])

    # In bfloat16, as published. The package's autocast to float32 works on a GPU alone.
    head = inferencer.model.rm_head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    half = score()
    head.remove()
    inferencer.model.float()
    outputs = {
        "weights": str(weights),
        "instruction": INSTRUCTION + prompt_with_special_token,
        "sizes": [smart_resize(*size, min_pixels=NUM_PIXELS, max_pixels=NUM_PIXELS) for size in inputs["sizes"]],
        "tokens": [inferencer.prepare_batch(images[:1], [text])["input_ids"][0] for text in inputs["awkward"]],
        "patches": [inferencer.prepare_batch([image], texts[:1])["pixel_values"] for image in images],
        "half": half,
        "outputs": score(),
    }
    inferencer.processor.image_processor = Qwen2VLImageProcessor()  # what `differentiable=True` does
    outputs["gradients"] = [gradient(inferencer, image, texts[0]) for image in inputs["images"]]
    torch.save(outputs, target)


main(*sys.argv[1:])
