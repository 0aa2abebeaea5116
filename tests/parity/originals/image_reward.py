"""What zai-org/ImageReward's package makes of random weights, texts and pictures.

The package's modules are imported without its `__init__.py`, which imports its trainer, and without what the trainer,
OpenAI's CLIP and activation checkpointing need. The image encoder is made smaller; all else is as published.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

# Its compiled operators belong to another build of torch than may be here; transforms need none of them.
sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")

package = ModuleType("ImageReward")
package.__path__ = list(find_spec("ImageReward").submodule_search_locations)
sys.modules |= {"ImageReward": package, "clip": ModuleType("clip")}
for name in ("fairscale", "fairscale.nn", "fairscale.nn.checkpoint"):
    sys.modules[name] = ModuleType(name)
checkpointing = ModuleType("checkpoint_activations")
checkpointing.checkpoint_wrapper = None
sys.modules["fairscale.nn.checkpoint.checkpoint_activations"] = checkpointing

from ImageReward import utils  # noqa: E402
from ImageReward.ImageReward import ImageReward  # noqa: E402
from ImageReward.models.BLIP import blip_pretrain  # noqa: E402
from ImageReward.models.BLIP.vit import VisionTransformer  # noqa: E402
from PIL import Image  # noqa: E402

inputs = torch.load(sys.argv[1], weights_only=True)
width, depth, heads = inputs["vit"]
blip_pretrain.create_vit = lambda *_: (
    VisionTransformer(224, 16, embed_dim=width, depth=depth, num_heads=heads),
    width,
)

torch.manual_seed(0)
Path("med_config.json").write_text(json.dumps(inputs["med_config"]))
model = ImageReward("med_config.json")
for name, tensor in model.named_parameters():  # as initialised every score would be nearly the same
    scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
    torch.nn.init.normal_(tensor, 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, scale)
torch.save(model.state_dict(), "ImageReward.pt")

model = utils.load("ImageReward.pt", device="cpu", med_config="med_config.json")
pictures = [Image.fromarray(array.numpy()) for array in inputs["pictures"]]
tokens = model.blip.tokenizer(
    inputs["texts"], padding="max_length", truncation=True, max_length=35, return_tensors="pt"
)
with torch.no_grad():
    outputs = {
        "pixels": torch.stack([model.preprocess(picture) for picture in pictures]),
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask,
        # The arithmetic alone, without the 8-bit rounding of a resized picture: [picture, text].
        "from_pixels": torch.cat(
            [
                model.score_gard(
                    tokens.input_ids, tokens.attention_mask, pixels.expand(len(inputs["texts"]), -1, -1, -1)
                )
                for pixels in inputs["pixels"]
            ],
            dim=1,
        ).T,
        "scores": torch.tensor([[model.score(text, picture) for text in inputs["texts"]] for picture in pictures]),
    }
torch.save(outputs, sys.argv[2])
