"""An adapter's own weights, for diffusers and for ComfyUI."""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from srpo_lightning.files.pretrained import load_whole
from srpo_lightning.jobs.export.formats import Format
from srpo_lightning.jobs.export.weights import Stored, base_transformer
from srpo_lightning.policies import comfy
from srpo_lightning.policies.adapters import save_lora, scaled
from srpo_lightning.policies.lora_file import PREFIX


class LoraFiles(Format):
    """For the pipeline's `load_lora_weights`; without DoRA, and but of Wan, for ComfyUI too."""

    relation = "adapter"

    @property
    def comfyui(self) -> str:  # type: ignore[override]  # a constant in others
        """DoRA's lengths of rows have another name there, and so has everything of Wan."""
        assert self.policy.adapter is not None
        if self.policy.adapter.dora or self.policy.comfy_has_original_names:
            return "this file is wrong: export with `--format lora-comfy` for it"
        return "put `pytorch_lora_weights.safetensors`, under a name of its own, into `models/loras/`"

    def write(self, folder: Path) -> None:
        """One file."""
        items = tqdm(self.trained.items(), desc="weights", unit="tensor")
        weights = {name: stored.read() for name, stored in items}
        save_lora(self.policy.pipeline_class, self.outline, weights, folder, self.dtype)

    @cached_property
    def scaled(self) -> dict[str, Stored]:
        """With the scale in B."""
        assert self.policy.adapter is not None
        scale = self.policy.adapter.scale

        def read(name: str) -> Tensor:
            return scaled(name, self.trained[name].read(), scale)

        return {name: Stored(stored.shape, partial(read, name)) for name, stored in self.trained.items()}

    @property
    def expected(self) -> dict[str, Stored]:
        """All of it."""
        return self.scaled

    def python(self, folder: Path) -> list[str]:
        """Beside the weights before training."""
        start = self.policy.start
        made = start and f"{self.policy.transformer_class}.from_pretrained({start!a}, torch_dtype={self.dtype})"
        return [*self.around(made), f"pipe.load_lora_weights({str(folder)!a})"]


class LoraComfy(LoraFiles):
    """For ComfyUI."""

    elsewhere = "diffusers reads another file: export with `--format lora` for it"

    @property
    def file(self) -> str:
        """The file's name."""
        return f"{self.name}.safetensors"

    @property
    def comfyui(self) -> str:  # type: ignore[override]  # a constant in others
        """Where to."""
        return f"put `{self.file}` into `models/loras/`, and load it with the node *Load LoRA*, at strength 1"

    @cached_property
    def base(self) -> dict[str, Stored]:
        """The weights beside which the adapter was trained."""
        return base_transformer(self.policy, self.outline)

    @cached_property
    def layers(self) -> list[str]:
        """The names of those with an adapter."""
        return list(dict.fromkeys(name.split(".lora_")[0] for name in self.trained))

    @cached_property
    def names(self) -> dict[str, str]:
        """ComfyUI's name of each layer."""
        if not self.policy.comfy_has_original_names:
            return {layer: f"{PREFIX}{layer}" for layer in self.layers}
        assert self.policy.single_file is not None
        sources = self.policy.single_file.sources(self.base)
        theirs = {parts[0]: name for name, parts in sources.items() if len(parts) == 1}
        return {layer: f"{comfy.ORIGINAL}{theirs[f'{layer}.weight'].removesuffix('.weight')}" for layer in self.layers}

    def write(self, folder: Path) -> None:
        """One file."""
        tensors: dict[str, Tensor] = {}
        for layer in tqdm(self.layers, desc="weights", unit="layer"):
            prefix = f"{layer}.lora_"
            parts = {
                name.removeprefix(prefix).split(".")[0]: stored.read()
                for name, stored in self.scaled.items()
                if name.startswith(prefix)
            }
            tensors |= comfy.layer_file(self.names[layer], self.base[f"{layer}.weight"].read(), parts, self.dtype)
        save_file(tensors, folder / self.file, {"format": "pt"})

    @property
    def expected(self) -> dict[str, Stored]:
        """Nothing: the weights are computed as ComfyUI would; the picture tells."""
        return {}

    def given(self, folder: Path) -> dict[str, Any]:
        """With ComfyUI's arithmetic."""
        transformer = load_whole(self.policy.diffusers_class, *self.policy.start_place, torch_dtype=self.dtype)
        file = load_file(folder / self.file)
        for layer in self.layers:
            weight = transformer.get_submodule(layer).weight
            weight.data = comfy.patched(self.names[layer], self.base[f"{layer}.weight"].read(), file).to(weight.dtype)
        return {"transformer": transformer}

    def python(self, folder: Path) -> list[str]:
        """Around what is given."""
        return self.around("")
