"""Where a policy starts: from a transformer or a LoRA of its own, in the place of the base's."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from srpo_lightning.jobs.estimate.prediction import without_weights
from srpo_lightning.policies import FluxPolicy, Lora, adapters
from srpo_lightning.policies.lora_file import FILE, LoraFile
from tests import tiny

pytest.importorskip("peft")

KINDS = {
    "lora": Lora(4, alpha=2.0),
    "rslora": Lora(4, alpha=6.0, rslora=True),
    "dora": Lora(4, alpha=2.0, dora=True),
}


@pytest.fixture(scope="module")
def other(models, tmp_path_factory):
    """Another pipeline of the same geometry; its transformer's folder."""
    return tiny.write_pipeline(tmp_path_factory.mktemp("other") / "flux", seed=7) / "transformer"


def trained(policy) -> dict[str, torch.Tensor]:
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def disturb(policy) -> dict[str, torch.Tensor]:
    """As if it had been trained; its weights then."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trained(policy).values():
            p.add_(torch.randn(p.shape, generator=draw), alpha=0.2)
    return {name: p.detach().clone() for name, p in trained(policy).items()}


def write_lora(models, folder, lora) -> dict[str, torch.Tensor]:
    policy = tiny.new_policy(models, adapter=lora)
    weights = disturb(policy)
    adapters.save_lora(
        "FluxPipeline",
        policy.transformer,
        {name.removeprefix("transformer."): p for name, p in weights.items()},
        folder,
    )
    return weights


def velocity(policy) -> torch.Tensor:
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return policy(x, torch.tensor([0.9, 0.8]), tiny.new_conditions(2), 3.5)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_transformer_of_its_own_stands_in_the_place_of_the_bases_now_and_after_a_restart(models, other, is_streamed):
    policy = FluxPolicy(str(models.pipeline), 32, 32, transformer=str(other))
    policy.load((lambda model, blocks: model.to_empty(device="cpu")) if is_streamed else None)
    expected = tiny.new_policy(models._replace(pipeline=other.parent))
    base = tiny.new_policy(models)
    assert torch.equal(velocity(policy), velocity(expected))
    assert not torch.equal(velocity(policy), velocity(base))
    assert all(torch.equal(a, b) for a, b in zip(policy.vae.parameters(), base.vae.parameters(), strict=True))
    disturb(policy)
    policy.restart()
    assert torch.equal(velocity(policy), velocity(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_starts_where_the_file_left_it_now_and_after_a_restart(models, tmp_path, kind):
    lora = KINDS[kind]
    weights = write_lora(models, tmp_path / "lora", lora)
    policy = tiny.new_policy(models, adapter=replace(lora, pretrained=str(tmp_path / "lora")))
    for _ in range(2):
        for name, p in trained(policy).items():
            torch.testing.assert_close(p, weights[name], rtol=1e-6, atol=0)
        disturb(policy)
        policy.restart()
    assert policy.adapter.architecture([]) == lora.architecture([])
    assert not policy.has_reference  # without its adapter it is not what it started from


@pytest.mark.parametrize("alpha", [1.0, 8.0])
def test_with_another_alpha_the_weights_act_as_before(models, tmp_path, alpha):
    write_lora(models, tmp_path / "lora", KINDS["lora"])
    before = tiny.new_policy(models, adapter=replace(KINDS["lora"], pretrained=str(tmp_path / "lora")))
    after = tiny.new_policy(models, adapter=Lora(4, alpha=alpha, pretrained=str(tmp_path / "lora")))
    torch.testing.assert_close(velocity(after), velocity(before), rtol=0, atol=1e-6)
    untrained = tiny.new_policy(models, adapter=Lora(4))
    assert (velocity(after) - velocity(untrained)).abs().max() > 1e-3


def test_the_scale_of_a_foreign_file_is_its_metadatas_or_its_alphas_or_one(models, tmp_path):
    write_lora(models, tmp_path / "ours", KINDS["lora"])
    tensors = load_file(tmp_path / "ours" / FILE)
    for name, settings, alphas, expected in (
        ("plain", {}, {}, 1.0),
        ("metadata", {"transformer.lora_alpha": 6, "transformer.use_rslora": True}, {}, 3.0),
        ("alphas", {}, {f"{key[:-14]}.alpha": torch.tensor(2.0) for key in tensors if "lora_B" in key}, 0.5),
    ):
        (tmp_path / name).mkdir()
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
        save_file(tensors | alphas, tmp_path / name / FILE, metadata)
        file = LoraFile.read(str(tmp_path / name))
        assert set(file.scales.values()) == {expected}
        assert len(file.scales) == len(file.shapes) / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, r"found \[4, 16\], expected \[8, 16\]; set rank, dora and target_modules as they were"),
        ({"dora": True}, r"first .*lora_magnitude_vector: found None, expected \[16\]; set rank, dora"),
        ({"target_modules": ["to_q"]}, r"found \[4, 16\], expected None; set rank, dora and target_modules"),
    ],
)
def test_a_lora_of_another_kind_is_refused_before_weights_are_read(models, tmp_path, change, message):
    write_lora(models, tmp_path / "lora", Lora(4))
    with pytest.raises(ValueError, match=message) as error:
        FluxPolicy(str(models.pipeline), 32, 32, adapter=replace(Lora(4), pretrained=str(tmp_path / "lora"), **change))
    assert "\n" not in str(error.value)


def test_what_is_no_lora_and_no_transformer_is_refused_with_the_cure(models, other, tmp_path):
    def policy(**settings):
        return FluxPolicy(str(models.pipeline), 32, 32, **settings)

    with pytest.raises(ValueError, match=r"holds no pytorch_lora_weights.safetensors: give a folder that `export"):
        policy(adapter=Lora(4, pretrained=str(tmp_path)))
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"is no LoRA of one rank and scale by diffusers' names \(lora_unet_x"):
        policy(adapter=Lora(4, pretrained=str(tmp_path)))
    with pytest.raises(ValueError, match=r"holds no config.json: give a transformer's own folder, .* its transformer/"):
        policy(transformer=str(models.pipeline))
    shutil.copytree(other, tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"joint_attention_dim": 24}))
    with pytest.raises(ValueError, match=r"whose joint_attention_dim is 24 where that of pretrained is 16: give a tr"):
        policy(transformer=str(tmp_path / "wide"))


def test_adapters_beside_another_transformer_are_another_policy(models, other, tmp_path):
    """A checkpoint holds the adapter alone: read beside other weights it would mean something else."""

    def fingerprint(**settings):
        return FluxPolicy(str(models.pipeline), 32, 32, **settings).fingerprint

    beside = fingerprint(adapter=Lora(4), transformer=str(other))
    assert beside != fingerprint(adapter=Lora(4))
    shutil.copytree(other, tmp_path / "moved")
    assert beside == fingerprint(adapter=Lora(4), transformer=str(tmp_path / "moved"))
    base = models.pipeline / "transformer"
    assert beside != fingerprint(adapter=Lora(4), transformer=str(base))
    assert fingerprint(transformer=str(other)) == fingerprint()  # trained whole, the checkpoint has all of it


def test_memory_is_predicted_without_reading_either(models, other, tmp_path):
    write_lora(models, tmp_path / "lora", Lora(4))
    policy = FluxPolicy(
        str(models.pipeline), 32, 32, transformer=str(other), adapter=Lora(4, pretrained=str(tmp_path / "lora"))
    )
    with without_weights():
        policy.load()
    assert {p.device.type for p in policy.transformer.parameters()} == {"meta"}
