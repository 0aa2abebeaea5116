import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

from srpo_lightning.draws import Draws
from srpo_lightning.objectives import SRPO, ControlWords
from srpo_lightning.policies import FluxPolicy
from srpo_lightning.policies.packing import unpack
from tests import tiny

SIGMA = torch.tensor([0.9, 0.8])


def inputs(policy, batch_size: int = 2) -> tuple:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, *policy.latent_shape(), generator=draw), tiny.new_conditions(batch_size)


@pytest.fixture(scope="module")
def policy(models):
    return tiny.new_policy(models)


def test_the_constructor_reads_no_weights_and_load_reads_them_once(models):
    policy = FluxPolicy(str(models.pipeline), 32, 32)
    assert list(policy.parameters()) == []
    policy.load()
    transformer = policy.transformer
    policy.load()
    assert policy.transformer is transformer


def test_only_the_transformer_is_trained(policy):
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {f"transformer.{name}" for name, _ in policy.transformer.named_parameters()}
    assert any(name.startswith("vae.") for name, _ in policy.named_parameters())


def test_each_sample_is_asked_at_its_own_noise_level(policy):
    x, conditions = inputs(policy)
    with torch.no_grad():
        both = policy(x, SIGMA, conditions, 3.5)
        first = policy(x, SIGMA[:1].expand(2), conditions, 3.5)
        second = policy(x, SIGMA[1:].expand(2), conditions, 3.5)
    torch.testing.assert_close(both, torch.stack([first[0], second[1]]), rtol=0, atol=1e-6)
    assert (first - second).abs().max() > 1e-4


def test_guidance_reaches_a_model_that_embeds_it(policy):
    x, conditions = inputs(policy)
    with torch.no_grad():
        assert not torch.equal(policy(x, SIGMA, conditions, 1.0), policy(x, SIGMA, conditions, 3.5))


def test_a_model_without_guidance_embedding_ignores_guidance(models, tmp_path):
    folder = tiny.write_pipeline(tmp_path / "flux", guidance_embeds=False)
    policy = tiny.new_policy(models._replace(pipeline=folder))
    x, conditions = inputs(policy)
    with torch.no_grad():
        assert torch.equal(policy(x, SIGMA, conditions, 1.0), policy(x, SIGMA, conditions, 3.5))


def test_quantized_timesteps_are_truncated_and_not_rounded(models, policy):
    """The research code: int(sigma * 1000) / 1000."""
    quantized = tiny.new_policy(models, quantize_timesteps=True)
    x, conditions = inputs(policy)
    with torch.no_grad():
        fine = quantized(x, torch.tensor([0.9127, 0.7509]), conditions, 3.5)
        truncated = policy(x, torch.tensor([0.912, 0.750]), conditions, 3.5)
        exact = policy(x, torch.tensor([0.9127, 0.7509]), conditions, 3.5)
    torch.testing.assert_close(fine, truncated, rtol=0, atol=1e-6)
    assert (fine - exact).abs().max() > 1e-5


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("exact", [False, True])
def test_under_autocast_level_and_guidance_are_rounded_unless_they_are_to_be_exact(models, exact):
    policy = tiny.new_policy(models, exact_conditioning=exact)
    x, conditions = inputs(policy)
    told = []
    projection = policy.transformer.time_text_embed.time_proj  # of the level, then of the guidance
    projection.register_forward_pre_hook(lambda _, args: told.append(args[0].float() / 1000))
    level = torch.tensor([0.9127, 0.7509])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        policy(x, level, conditions, 3.1)
    assert torch.equal(told[0], level) == torch.allclose(told[1], torch.full((2,), 3.1), atol=1e-5) == exact
    torch.testing.assert_close(told[0], level, rtol=0.01, atol=0)
    assert not policy.transformer.time_text_embed._forward_pre_hooks


def test_without_autocast_exact_conditioning_changes_nothing(models, policy):
    x, conditions = inputs(policy)
    exact = tiny.new_policy(models, exact_conditioning=True)
    with torch.no_grad():
        assert torch.equal(exact(x, SIGMA, conditions, 3.5), policy(x, SIGMA, conditions, 3.5))


class Waits(TorchDispatchMode):
    """Operations that would make the host wait for a device: numbers asked for, and copies that are not queued."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, kwargs = func(*args, **kwargs or {}), kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device != result.device:
            self.found += [] if kwargs.get("non_blocking") else [func]
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type != "cpu":
            self.found.append(func)
        return result


def test_no_step_of_a_rollout_makes_the_host_wait_for_the_device(models):
    """The meta device stands for one that computes while the host goes on."""
    policy = tiny.new_policy(models).to("meta")
    conditions = tiny.new_conditions(2)
    there = conditions._replace(
        text=conditions.text.each(lambda tensor: tensor.to("meta")), indices=conditions.indices.to("meta")
    )
    with Waits() as waits:
        rollout = SRPO(ControlWords(["x"], ["y"]), num_rollout_steps=3).rollout(policy, there, Draws(0))
    assert rollout.x0.device.type == "meta"
    assert waits.found == []


def test_decoding_has_a_gradient_and_stays_in_range(policy):
    latents = inputs(policy)[0].requires_grad_()
    images = policy.decode(latents)
    assert images.shape == (2, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1
    (gradient,) = torch.autograd.grad(images.sum(), latents)
    assert (gradient.abs().amax((1, 2)) > 0).all()


def test_the_velocity_comes_in_the_dtype_of_the_latents_whatever_the_weights_are_kept_in(models):
    policy = tiny.new_policy(models, dtype="bfloat16", vae_dtype="bfloat16")
    x, conditions = inputs(policy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert policy(x, SIGMA, conditions, 3.5).dtype == torch.float32
        assert policy.decode(x).dtype == torch.float32


def gradient(policy) -> torch.Tensor:
    policy.zero_grad()
    x, conditions = inputs(policy)
    policy.decode(policy(x, SIGMA, conditions, 3.5)).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.transformer.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", ["gradient_checkpointing", "vae_checkpointing"])
def test_checkpointing_does_not_change_the_gradient(models, policy, checkpointing):
    """Bit for bit: the same operations are run again."""
    expected = gradient(policy)
    checkpointed = tiny.new_policy(models, **{checkpointing: True})
    part = checkpointed.transformer if checkpointing == "gradient_checkpointing" else checkpointed.vae
    assert any(getattr(m, "gradient_checkpointing", False) for m in part.modules())
    assert torch.equal(gradient(checkpointed), expected)


def test_large_pictures_are_decoded_tile_by_tile_with_gradient(models):
    """AutoencoderKL.tiled_decode, bit for bit; the tiles are made 8 latents wide."""
    policy = tiny.new_policy(models, height=128, width=128, vae_tiling=True)
    policy.vae.tile_latent_min_size, policy.vae.tile_sample_min_size = 8, 64
    x = inputs(policy)[0].requires_grad_()
    images = policy.decode(x)
    z = unpack(x, (128, 128)) / 0.7 + 0.1
    assert torch.equal(images, (policy.vae.tiled_decode(z).sample / 2 + 0.5).clamp(0, 1))
    policy.vae.disable_tiling()
    assert not torch.equal(images, policy.decode(x))
    assert torch.autograd.grad(images.sum(), x)[0].abs().sum() > 0


def test_the_schedule_is_the_schedulers_unless_a_shift_is_given(models, policy):
    assert torch.equal(policy.sigmas(4), policy.sigmas(4, 3.0))
    assert not torch.equal(policy.sigmas(4), policy.sigmas(4, 1.0))
    dynamic = FluxPolicy(str(models.pipeline), 64, 64, resolution_shift=True)
    assert not torch.equal(dynamic.sigmas(4), policy.sigmas(4))
    assert torch.equal(dynamic.sigmas(4, 3.0), policy.sigmas(4, 3.0))
    tall = FluxPolicy(str(models.pipeline), 128, 64, resolution_shift=True)
    assert torch.equal(dynamic.sigmas(4, size=(128, 64)), tall.sigmas(4))
    assert not torch.equal(tall.sigmas(4), dynamic.sigmas(4))


def test_the_fingerprint_tells_architectures_apart_and_not_weights(models, policy, tmp_path):
    other = tiny.write_pipeline(tmp_path / "other", seed=5)
    wide = tiny.write_pipeline(tmp_path / "wide", width=24)
    assert FluxPolicy(str(other), 32, 32).fingerprint == policy.fingerprint
    assert FluxPolicy(str(wide), 32, 32).fingerprint != policy.fingerprint


@pytest.mark.parametrize(("height", "width", "cure"), [(40, 32, "height is 40.*32 or 48"), (32, 8, "width is 8.*16")])
def test_a_size_that_16_does_not_divide_is_refused_with_its_neighbours(models, height, width, cure):
    with pytest.raises(ValueError, match=cure):
        FluxPolicy(str(models.pipeline), height, width)


def test_a_folder_that_does_not_exist_is_refused_with_the_cure(tmp_path):
    with pytest.raises(ValueError, match=r"neither a folder here .* nor a hub model.*give the path"):
        FluxPolicy(str(tmp_path / "nowhere"), 32, 32)


def test_a_folder_without_a_transformer_is_refused_naming_the_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"transformer/config.json is missing: .*a whole model folder"):
        FluxPolicy(str(tmp_path), 32, 32)


def rolled_out(policy) -> torch.Tensor:
    objective = SRPO(ControlWords(["x"], ["y"]), num_rollout_steps=4)
    with policy.rolling_out():
        return objective.rollout(policy, tiny.new_conditions(2), Draws(0)).x0


def test_a_rollout_takes_what_hardly_changes_from_the_step_before_and_nothing_else_does(models, policy):
    plain = rolled_out(policy)
    never, always = (tiny.new_policy(models, rollout_cache=threshold) for threshold in (1e-9, 1e9))
    assert torch.equal(rolled_out(never), plain)
    calls = []
    last = always.transformer.single_transformer_blocks[-1].attn
    handle = last.register_forward_hook(lambda *_: calls.append(1))
    first, second = rolled_out(always), rolled_out(always)
    handle.remove()
    assert len(calls) == 2  # the first step of each rollout
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    x, conditions = inputs(policy)
    assert torch.equal(always(x, SIGMA, conditions, 3.5), policy(x, SIGMA, conditions, 3.5))


def test_a_feature_cache_beside_compiled_blocks_is_refused(models):
    with pytest.raises(ValueError, match="rollout_cache to null"):
        FluxPolicy(str(models.pipeline), 32, 32, compile=True, rollout_cache=0.1)


def test_no_memory_of_an_outline_is_filled(models, monkeypatch):
    """Deterministic algorithms fill what is not initialized: minutes for a model with 12 billion weights."""
    filled, policy = [], tiny.new_policy(models)
    monkeypatch.setattr(
        FluxTransformer2DModel,
        "from_config",
        lambda _: filled.append(torch.utils.deterministic.fill_uninitialized_memory),
    )
    policy.empty_transformer()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert filled == [False]
