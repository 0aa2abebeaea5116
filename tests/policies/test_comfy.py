"""Exported adapters under both loaders: diffusers' own, and ComfyUI's arithmetic, stated here again."""

import math

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from srpo_lightning.policies import Lora, adapters, comfy
from srpo_lightning.policies.lora_file import FILE, PREFIX
from tests import tiny

pytest.importorskip("peft")

KINDS = {
    "lora": Lora(4),
    "alpha": Lora(4, alpha=2.0),
    "rslora": Lora(4, alpha=6.0, rslora=True),
    "dora": Lora(4, dora=True),
    "dora alpha": Lora(4, alpha=2.0, dora=True),
}


@pytest.fixture(params=KINDS)
def lora(request):
    return KINDS[request.param]


@pytest.fixture
def policy(models, lora):
    """As if it had been trained."""
    policy = tiny.new_policy(models, adapter=lora)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=draw), alpha=0.2)
    return policy


def trained(policy, lora) -> dict[str, torch.Tensor]:
    """The weight of each adapted layer as it was trained, by the papers' formulas."""
    found = {}
    for name, layer in policy.transformer.named_modules():
        if hasattr(layer, "lora_A"):
            scale = (lora.alpha or 4) / (math.sqrt(4) if lora.rslora else 4)
            weight = layer.base_layer.weight + scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            if lora.dora:
                length = layer.lora_magnitude_vector["default"].weight
                weight = length[:, None] * weight / weight.norm(dim=1, keepdim=True)
            found[name] = weight.detach()
    return found


def own_weights(policy) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in policy.transformer.named_parameters() if ".lora_" in n}


def comfy_file(policy, lora, dtype=torch.float32) -> dict[str, torch.Tensor]:
    file = {}
    for name, layer in policy.transformer.named_modules():
        if hasattr(layer, "lora_A"):
            own = {
                key.removeprefix(f"{name}.lora_").split(".")[0]: adapters.scaled(key, tensor, lora.scale)
                for key, tensor in own_weights(policy).items()
                if key.startswith(f"{name}.lora_")
            }
            file |= comfy.layer_file(f"{PREFIX}{name}", layer.base_layer.weight.detach(), own, dtype)
    return file


def as_comfyui_loads(base, file, strength=1.0) -> dict[str, torch.Tensor]:
    """Every weight after its patches. q, k and v (and a single block's mlp) are rows of one weight there."""
    weights, left = {}, set(file)
    for layer, weight in base.items():
        weight, key = weight.clone(), f"transformer.{layer}"
        if f"{key}.lora_B.weight" not in file:
            continue
        up, down = file[f"{key}.lora_B.weight"], file[f"{key}.lora_A.weight"]
        alpha = file[f"{key}.alpha"].item() / down.shape[0] if f"{key}.alpha" in file else 1.0
        left -= {f"{key}.lora_B.weight", f"{key}.lora_A.weight", f"{key}.alpha", f"{key}.dora_scale"}
        diff = torch.mm(up.float(), down.float())
        if f"{key}.dora_scale" in file:
            dora_scale = file[f"{key}.dora_scale"].float()
            assert dora_scale.shape == (len(weight), 1)
            norm = weight.norm(dim=1, keepdim=True) + torch.finfo(weight.dtype).eps
            changed = (weight + alpha * diff) * (dora_scale / norm)
            weight += strength * (changed - weight)
        else:
            weight += strength * alpha * diff
        weights[layer] = weight
    assert not left, left  # "lora key not loaded"
    return weights


@pytest.fixture
def base(models):
    transformer = tiny.new_policy(models).transformer
    return {n: m.weight.detach() for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}


def test_comfyui_makes_the_trained_weights_of_its_file(policy, lora, base):
    expected, found = trained(policy, lora), as_comfyui_loads(base, comfy_file(policy, lora))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-6)
        assert (weight - base[name]).abs().max() > 0.1


def test_what_the_check_computes_is_what_comfyui_does(policy, lora, base):
    file = comfy_file(policy, lora)
    for name, weight in as_comfyui_loads(base, file).items():
        torch.testing.assert_close(comfy.patched(f"{PREFIX}{name}", base[name], file), weight, rtol=1e-6, atol=1e-6)


def test_in_bfloat16_the_lengths_of_rows_stay_exact(policy, lora, base):
    file = comfy_file(policy, lora, torch.bfloat16)
    for name, weight in as_comfyui_loads(base, file).items():
        torch.testing.assert_close(weight, trained(policy, lora)[name], rtol=0, atol=0.02)
        if lora.dora:
            length = policy.transformer.get_submodule(name).lora_magnitude_vector["default"].weight
            torch.testing.assert_close(weight.norm(dim=1), length.abs(), rtol=1e-5, atol=0)


def test_diffusers_makes_the_trained_weights_of_its_file_and_comfyui_too_without_dora(
    models, policy, lora, base, tmp_path
):
    adapters.save_lora("FluxPipeline", policy.transformer, own_weights(policy), tmp_path)
    pipeline = FluxPipeline.from_pretrained(models.pipeline)
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora()
    expected = trained(policy, lora)
    for name, weight in expected.items():
        found = pipeline.transformer.get_submodule(name).base_layer.weight
        torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-6)
    if not lora.dora:
        for name, weight in as_comfyui_loads(base, load_file(tmp_path / FILE)).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)


def test_diffusers_reads_the_alphas_of_comfyuis_file(models, policy, lora, tmp_path):
    if lora.dora:
        pytest.skip("dora_scale is not read")
    save_file(comfy_file(policy, lora), tmp_path / "x.safetensors")
    pipeline = FluxPipeline.from_pretrained(models.pipeline)
    pipeline.load_lora_weights(tmp_path / "x.safetensors")
    pipeline.fuse_lora()
    for name, weight in trained(policy, lora).items():
        found = pipeline.transformer.get_submodule(name).base_layer.weight
        torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-6)
