"""HPSv2's own code (package hpsv2) on a ViT of its architecture with random weights."""

import sys
import types
from pathlib import Path

import torch

# What scoring does not need: turtle graphics, a progress bar, the compiled operators of torchvision.
sys.modules["turtle"] = types.SimpleNamespace(forward=None)
sys.modules["clint"] = types.ModuleType("clint")
sys.modules["clint.textui"] = types.SimpleNamespace(progress=None)
library = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip  # noqa: E402
from PIL import Image  # noqa: E402

# The package lacks its vocabulary; open_clip's is the same file.
folder = Path(next(path for path in sys.path if (Path(path) / "hpsv2").is_dir())) / "hpsv2/src/open_clip"
vocabulary = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
if not (folder / vocabulary.name).exists():
    (folder / vocabulary.name).symlink_to(vocabulary)

from hpsv2 import img_score  # noqa: E402
from hpsv2.src.open_clip import image_transform, tokenizer  # noqa: E402
from hpsv2.src.open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg  # noqa: E402


def main(source: str, target: str) -> None:
    inputs = torch.load(source, weights_only=True)
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=64, head_width=4, patch_size=7, image_size=28)
    model = CLIP(32, vision, CLIPTextCfg(width=64, heads=16, layers=2), output_dict=True).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    weights = Path(target).with_name("HPS_v2.1_compressed.pt")
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, weights)

    padded = image_transform(28, is_train=False, resize_longest_max=True)
    cropped = image_transform(28, is_train=False)
    images = [Image.fromarray(image.numpy()) for image in inputs["images"]]
    scores = {}
    for name, transform in (("pad", padded), ("crop", cropped)):
        img_score.model_dict.update(model=model, preprocess_val=transform)
        scores[name] = torch.tensor(
            [[img_score.score(image, text, cp=str(weights))[0].item() for text in inputs["texts"]] for image in images]
        )
    vocabulary = tokenizer._tokenizer
    outputs = {
        "weights": str(weights),
        "scores": scores,
        "pixels": {"pad": [padded(image) for image in images], "crop": [cropped(image) for image in images]},
        "tokens": tokenizer.tokenize(inputs["texts"] + inputs["awkward"]),
        "vocabulary": dict(vocabulary.encoder),
        "merges": [list(pair) for pair in vocabulary.bpe_ranks],
    }
    torch.save(outputs, target)


main(*sys.argv[1:])
