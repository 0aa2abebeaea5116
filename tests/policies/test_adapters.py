import math
from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn

from srpo_lightning.callbacks import EMA, LoraExport, RunCheckpoint
from srpo_lightning.callbacks import lora as lora_callback
from srpo_lightning.files.owners import partial_path
from srpo_lightning.module import SRPOModule
from srpo_lightning.policies import FluxPolicy, Lora, adapters, loading
from srpo_lightning.run_folder import RunFolder
from srpo_lightning.training import nf4
from tests import tiny
from tests.faults import History

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

SIGMA = torch.tensor([0.9, 0.8])
KINDS = {"lora": Lora(4), "dora": Lora(4, dora=True), "rslora": Lora(4, alpha=6.0, rslora=True)}
QUANTIZED = {"adapter": Lora(4), "quantize": "nf4", "quantize_dir": None}


def velocity(policy, conditions=None) -> torch.Tensor:
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(1))
    return policy(x, SIGMA, conditions or tiny.new_conditions(2), 3.5)


def trained(policy) -> dict:
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def frozen(policy) -> dict:
    return {name: p.detach().clone() for name, p in policy.named_parameters() if not p.requires_grad}


def disturb(policy) -> None:
    """As if the adapters had been trained."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trained(policy).values():
            p.add_(torch.randn(p.shape, generator=draw), alpha=0.2)


def gradient(policy) -> torch.Tensor:
    policy.zero_grad()
    velocity(policy).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in trained(policy).values()])


def new_module(models, **settings) -> SRPOModule:
    module = tiny.new_module(models)
    module.policy = FluxPolicy(str(models.pipeline), 32, 32, **settings)
    return module


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def base(models):
    return tiny.new_policy(models)


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_at_the_base_models_output_bit_for_bit(models, base, kind):
    assert torch.equal(velocity(tiny.new_policy(models, adapter=KINDS[kind])), velocity(base))


def test_the_adapters_are_trained_in_float32_beside_a_frozen_base_in_bfloat16(models):
    policy = tiny.new_policy(models, adapter=Lora(4), dtype="bfloat16")
    assert all(".lora_A." in name or ".lora_B." in name for name in trained(policy))
    assert {p.dtype for p in trained(policy).values()} == {torch.float32}
    transformer = {p.dtype for name, p in frozen(policy).items() if name.startswith("transformer.")}
    assert transformer == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        expected = velocity(tiny.new_policy(models, dtype="bfloat16"))
        assert torch.equal(velocity(policy), expected)
        assert (gradient(policy) != 0).any()


def test_every_projection_of_attention_and_mlp_is_adapted_and_nothing_else(models, base):
    policy = tiny.new_policy(models, adapter=Lora(4))
    adapted = {name for name, m in policy.transformer.named_modules() if hasattr(m, "lora_A")}
    linear = {name for name, m in base.transformer.named_modules() if isinstance(m, nn.Linear)}
    others = {name for name in linear - adapted if "blocks." in name}
    assert {name.split(".", 2)[2] for name in others} == {"norm1.linear", "norm1_context.linear", "norm.linear"}
    assert len(adapted) == 12 + 5


def test_adapters_go_where_the_ends_of_names_say(models):
    policy = tiny.new_policy(models, adapter=Lora(4, target_modules=["to_q", "transformer_blocks.0.ff.net.2"]))
    assert {name.removeprefix("transformer.").split(".lora_")[0] for name in trained(policy)} == {
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.ff.net.2",
    }


def test_a_target_that_no_layer_has_is_refused_with_the_names_that_there_are(models):
    listed = r"'to_z'.* choose from attn.add_k_proj, .*proj_mlp, proj_out, or put the block .*transformer_blocks.0\."
    with pytest.raises(ValueError, match=listed):
        FluxPolicy(str(models.pipeline), 32, 32, adapter=Lora(target_modules=["to_q", "to_z"]))


def test_the_first_weights_depend_on_the_adapters_seed_and_on_no_hidden_state(models):
    first = trained(tiny.new_policy(models, adapter=Lora(4)))
    torch.manual_seed(torch.initial_seed() + 1)
    state = torch.get_rng_state()
    assert equal(trained(tiny.new_policy(models, adapter=Lora(4))), first)
    assert torch.equal(torch.get_rng_state(), state)
    other = trained(tiny.new_policy(models, adapter=Lora(4, seed=1)))
    differs = {name.split(".lora_")[1][0] for name in first if not torch.equal(first[name], other[name])}
    assert differs == {"A"}


def test_the_first_weights_are_drawn_on_the_cpu_whatever_torchs_default_device_is(models):
    """Lightning makes a GPU the default while it loads; the meta device, which has no numbers, stands in for it."""
    policy, expected = (tiny.new_policy(models, adapter=Lora(4)) for _ in range(2))
    for parameter in trained(policy).values():
        torch.nn.init.constant_(parameter, 7)
    with torch.device("meta"):
        policy.restart()
    found = trained(policy)
    assert all(torch.equal(found[name], p) for name, p in trained(expected).items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapted_model_is_the_one_with_the_papers_weights(models, kind):
    """W + alpha / rank B A (LoRA), alpha / sqrt(rank) (rsLoRA), and m (W + B A) / |W + B A| by rows (DoRA)."""
    policy, plain = tiny.new_policy(models, adapter=KINDS[kind]), tiny.new_policy(models)
    disturb(policy)
    scale = 6.0 / math.sqrt(4) if kind == "rslora" else 1.0
    for name, layer in policy.transformer.named_modules():
        if hasattr(layer, "lora_A"):
            weight = layer.base_layer.weight + scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            if kind == "dora":
                length = layer.lora_magnitude_vector["default"].weight
                weight = length[:, None] * weight / weight.norm(dim=1, keepdim=True)
            plain.transformer.get_submodule(name).weight.data = weight
    torch.testing.assert_close(velocity(policy), velocity(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"adapter": Lora(4)}, {"adapter": Lora(4, dora=True)}, QUANTIZED])
def test_gradient_checkpointing_does_not_change_the_adapters_gradient(models, settings):
    expected = gradient(tiny.new_policy(models, **settings))
    checkpointed = tiny.new_policy(models, gradient_checkpointing=True, **settings)
    assert checkpointed.transformer.gradient_checkpointing
    assert torch.equal(gradient(checkpointed), expected)
    assert expected.count_nonzero() > 1000


def test_dropout_acts_on_the_trained_step_and_not_on_rollouts(models, base):
    policy = tiny.new_policy(models, adapter=Lora(4, dropout=0.5))
    disturb(policy)
    with torch.no_grad():
        rollout = velocity(policy)
        assert torch.equal(velocity(policy), rollout)
    assert not torch.equal(velocity(policy), rollout)
    assert torch.equal(velocity(policy.eval()), rollout)


def test_a_checkpoint_holds_adapters_alone_and_a_resumed_run_is_the_unbroken_one(models, features, tmp_path):
    def fit(run, steps, path=None):
        history, ema = History(), EMA(decay=0.9)
        trainer = tiny.new_trainer(tmp_path / run, [history, ema, RunCheckpoint(2)], max_steps=steps)
        trainer.fit(new_module(models, adapter=Lora(4)), tiny.new_data(models, features), ckpt_path=path)
        return history.weights[-1], ema.weights

    whole, average = fit("whole", 4)
    fit("halves", 2)
    halves, resumed_average = fit("halves", 4, RunFolder(tmp_path / "halves").checkpoint(2))
    assert equal(halves, whole)
    assert equal(resumed_average, average)
    assert not equal(average, whole)
    saved = torch.load(RunFolder(tmp_path / "whole").checkpoint(4), weights_only=True)
    assert saved["state_dict"].keys() == saved["ema"].keys() == whole.keys()
    assert len(saved["state_dict"]) == 2 * (12 + 5)
    assert all(".lora_" in name for name in whole)


@pytest.mark.parametrize(
    "other",
    [{"rank": 8}, {"alpha": 8.0}, {"target_modules": ["to_q"]}, {"dora": True}, {"rslora": True}],
    ids=lambda change: next(iter(change)),
)
def test_the_fingerprint_names_what_the_adapters_weights_depend_on(models, base, other):
    def fingerprint(adapter):
        return FluxPolicy(str(models.pipeline), adapter=adapter).fingerprint

    assert fingerprint(replace(Lora(4), **other)) != fingerprint(Lora(4)) != base.fingerprint
    assert fingerprint(Lora(4, alpha=4.0, dropout=0.1, seed=1)) == fingerprint(Lora(4))


def test_a_checkpoint_of_another_adapter_is_refused(models, features, tmp_path):
    data = tiny.new_data(models, features)
    tiny.new_trainer(tmp_path, [RunCheckpoint(1)], max_steps=1).fit(new_module(models, adapter=Lora(4)), data)
    with pytest.raises(ValueError, match=r"(?s)of another policy.*\"rank\": 4.*\"rank\": 8"):
        tiny.new_trainer(tmp_path).fit(
            new_module(models, adapter=Lora(8)), data, ckpt_path=RunFolder(tmp_path).checkpoint(1)
        )


def test_a_base_in_4_bits_is_close_to_the_unquantized_one_and_is_the_rounded_one(models, base):
    functional = pytest.importorskip("bitsandbytes.functional")
    policy, rounded = tiny.new_policy(models, **QUANTIZED), tiny.new_policy(models)
    for name, weight in adapters.base_tensors(policy.transformer).items():
        if hasattr(weight, "quant_state"):
            rounded.transformer.get_parameter(name).data = functional.dequantize_4bit(weight.data, weight.quant_state)
    torch.testing.assert_close(velocity(policy), velocity(rounded), rtol=0, atol=1e-5)
    layers = [layer for layer in policy.transformer.modules() if hasattr(layer, "lora_A")]
    assert {type(layer).__module__ for layer in layers} == {"peft.tuners.lora.bnb"}
    assert 0 < (velocity(policy) - velocity(base)).abs().max() < 0.05 * velocity(base).abs().max()


def test_blocks_are_read_and_rounded_one_by_one_to_what_rounding_the_whole_model_gives(models, monkeypatch):
    """So that the model is never whole in memory; what is outside the blocks is read last."""
    waiting, round_block = [], loading.keep_in_4_bits

    def recorded(block, double):
        assert not any(tensor.is_meta for tensor in block.state_dict().values())
        waiting.append(sum(tensor.is_meta for tensor in adapters.base_tensors(made[0]).values()))
        round_block(block, double=double)

    made, cast = [], loading.cast
    monkeypatch.setattr(loading, "cast", lambda *arguments: made.append(cast(*arguments)) or made[-1])
    monkeypatch.setattr(loading, "keep_in_4_bits", recorded)
    policy = FluxPolicy(str(models.pipeline), 32, 32, **QUANTIZED)
    found = loading.read_in_4_bits(policy)
    outside = len([name for name in adapters.base_tensors(found) if "blocks." not in name])
    single = len(list(policy.empty_transformer().single_transformer_blocks.parameters()))
    assert waiting == [outside + single, outside]
    whole = FluxTransformer2DModel.from_pretrained(models.pipeline, subfolder="transformer")
    for _, block in loading.blocks(whole):
        nf4.keep_in_4_bits(block)
    state, expected = found.state_dict(), whole.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_a_base_in_4_bits_stays_as_it_is_while_its_adapters_learn(models, features, tmp_path):
    module = new_module(models, **QUANTIZED)
    module.configure_model()
    before, adapter = frozen(module), {name: p.detach().clone() for name, p in trained(module).items()}
    tiny.new_trainer(tmp_path, max_steps=2).fit(module, tiny.new_data(models, features))
    assert equal(frozen(module), before)
    assert not any(torch.equal(p, adapter[name]) for name, p in trained(module).items())


def test_4_bits_take_as_many_bytes_as_documented_in_the_blocks_and_nowhere_else(models, tmp_path):
    """Per weight 4 bits and a float32 per 64; twice rounded, a byte per 64 and a float32 per 256 of these."""
    wide = models._replace(pipeline=tiny.write_pipeline(tmp_path / "flux", width=64))

    def stored(**settings):
        policy = tiny.new_policy(wide, **settings)
        layers = {n: m for n, m in policy.transformer.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n}
        sizes = {True: 0, False: 0}
        for name, layer in layers.items():
            state = getattr(layer.weight, "quant_state", None)
            parts = [
                layer.weight,
                *([state.absmax] if state else []),
                *([state.state2.absmax] if state and state.nested else []),
            ]
            sizes["blocks." in name] += sum(part.nbytes for part in parts)
        return sizes

    full, single = stored(adapter=Lora(4)), stored(**QUANTIZED)
    double = stored(**QUANTIZED | {"quantize": "nf4-double"})
    assert single[False] == double[False] == full[False]
    assert 8 * 4 * single[True] / full[True] == 4 + 32 / 64
    assert 4.125 < 8 * 4 * double[True] / full[True] < 4.14


def test_4_bits_without_an_adapter_are_refused(models):
    with pytest.raises(ValueError, match=r"quantize is nf4, but .* cannot be trained: give .*adapter"):
        FluxPolicy(str(models.pipeline), 32, 32, quantize="nf4")


def test_4_bits_are_not_divided_over_ranks(models):
    with pytest.raises(ValueError, match=r"cannot be divided over ranks: set trainer.strategy to ddp"):
        FluxPolicy(str(models.pipeline), 32, 32, **QUANTIZED).load(lambda model, blocks: None)


@pytest.mark.parametrize(("module", "package", "extra"), [(adapters, "peft", "lora"), (nf4, "bitsandbytes", "quant")])
def test_a_missing_package_is_refused_with_the_command_that_installs_it(models, monkeypatch, module, package, extra):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"needs {package}: pip install 'srpo-lightning\[{extra}\]'"):
        FluxPolicy(str(models.pipeline), 32, 32, **QUANTIZED)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_reads_the_exported_adapter_and_its_average(models, features, tmp_path, kind):
    module, ema = new_module(models, adapter=KINDS[kind]), EMA(decay=0.5)
    trainer = tiny.new_trainer(tmp_path, [LoraExport(3), ema], max_steps=3)
    trainer.fit(module, tiny.new_data(models, features))
    for p in trained(module).values():
        assert p.isfinite().all()
    expected = {"": velocity(module.policy)}
    ema.num_updates = 3
    with torch.no_grad(), ema._in_place_of(module):
        expected["ema"] = velocity(module.policy)
    for place, theirs in expected.items():
        pipeline = FluxPipeline.from_pretrained(models.pipeline)
        pipeline.load_lora_weights(RunFolder(tmp_path).lora(3) / place)
        policy = tiny.new_policy(models)
        before, policy.transformer = velocity(policy), pipeline.transformer
        torch.testing.assert_close(velocity(policy), theirs, rtol=0, atol=1e-5)
        assert (velocity(policy) - before).abs().max() > 1e-3
    assert (expected[""] - expected["ema"]).abs().max() > 1e-4


@pytest.mark.parametrize(("max_steps", "exported"), [(4, [2, 4]), (5, [2, 4, 5])])
def test_the_adapter_is_exported_every_so_many_steps_and_at_the_end_once_each(
    models, features, tmp_path, monkeypatch, max_steps, exported
):
    written = []

    def record(pipeline_class, transformer, weights, folder):
        written.append(folder)
        folder.mkdir(exist_ok=True)

    monkeypatch.setattr(lora_callback, "save_lora", record)
    trainer = tiny.new_trainer(tmp_path, [LoraExport(2)], max_steps=max_steps, accumulate_grad_batches=2)
    trainer.fit(new_module(models, adapter=Lora(4)), tiny.new_data(models, features))
    assert written == [partial_path(RunFolder(tmp_path).lora(n)) for n in exported]
    assert sorted(p.name for p in RunFolder(tmp_path).lora(0).parent.iterdir()) == [
        f"step-0000000{n}" for n in exported
    ]


def test_an_export_that_breaks_off_leaves_nothing_under_the_final_name(models, features, tmp_path, monkeypatch):
    def break_off(pipeline_class, transformer, weights, folder):
        adapters.save_lora(pipeline_class, transformer, weights, folder)
        raise OSError("no space left")

    monkeypatch.setattr(lora_callback, "save_lora", break_off)
    with pytest.raises(OSError, match="no space left"):
        tiny.new_trainer(tmp_path, [LoraExport()], max_steps=1).fit(
            new_module(models, adapter=Lora(4)), tiny.new_data(models, features)
        )
    assert not RunFolder(tmp_path).lora(1).exists()


def test_exporting_the_adapter_of_a_policy_without_one_is_refused_before_weights_are_read(models, features, tmp_path):
    module = tiny.new_module(models)
    with pytest.raises(ValueError, match=r"the policy has none: take it out of trainer.callbacks, or give"):
        tiny.new_trainer(tmp_path, [LoraExport()]).fit(module, tiny.new_data(models, features))
    assert module.policy.transformer is None


def test_without_its_adapter_a_policy_is_its_own_reference(models):
    policy, base = tiny.new_policy(models, adapter=Lora(4)), tiny.new_policy(models)
    assert policy.has_reference
    assert not base.has_reference
    disturb(policy)
    after = velocity(policy)
    with policy.as_reference():
        assert torch.equal(velocity(policy), velocity(base))
    assert torch.equal(velocity(policy), after)
    assert not torch.equal(after, velocity(base))
