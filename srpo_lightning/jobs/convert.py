"""`convert`: a published HPSv2 file, once, into a folder that loads without unpickling."""

import json
from pathlib import Path

from transformers import CLIPTokenizer

from srpo_lightning.files.checkpoints import complete_or_absent_folder
from srpo_lightning.files.pretrained import unreadable_is_refused
from srpo_lightning.rewards import HPSv2
from srpo_lightning.rewards.pixels import CLIP_MEAN, CLIP_STD


def convert(source: str, output: str, processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K") -> None:
    """Write the published HPSv2 or HPSv2.1 weights as a transformers CLIPModel folder.

    Args:
        source: File HPS_v2.1_compressed.pt or HPS_v2_compressed.pt.
        output: Folder to write, for `HPSv2` to take as `pretrained`.
        processor: Folder or hub id with CLIP's tokenizer; the `tokenizer` folder of FLUX.1-dev has it too.

    Raises:
        ValueError: if the source is another file, or the output exists.
    """
    folder = Path(output).expanduser()
    if folder.exists():
        raise ValueError(f"{folder} exists already: name another output, or delete it")
    if not Path(source).expanduser().is_file():
        raise ValueError(
            f"{source} is no file: download HPS_v2.1_compressed.pt from the hub model xswu/HPSv2 and name it"
        )
    reward = HPSv2(source, processor=processor)
    reward.load()
    assert reward.clip is not None
    size = reward.clip.config.vision_config.image_size
    with complete_or_absent_folder(folder) as incomplete:
        reward.clip.save_pretrained(incomplete)
        with unreadable_is_refused(processor):
            CLIPTokenizer.from_pretrained(processor).save_pretrained(incomplete)
        (incomplete / "preprocessor_config.json").write_text(json.dumps(processor_config(size), indent=2))
    print(f"{folder}: {sum(p.numel() for p in reward.clip.parameters()):,} parameters from {source}")


def processor_config(size: int) -> dict[str, object]:
    """What a CLIP's image processor needs to know, of pictures of so many pixels a side."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
