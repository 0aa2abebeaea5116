"""Blocks compiled and with other attention kernels, against the same blocks as they are."""

from collections import Counter

import pytest
import torch
import torch._inductor.config
import torch._inductor.metrics
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch._dynamo.utils import counters

from srpo_lightning.policies import FluxPolicy, loading, parallel
from srpo_lightning.policies.adapters import Lora
from tests import tiny

pytestmark = [  # torch.compile's own, of torch 2.13
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.fixture
def traced(monkeypatch):
    """Dynamo and AOTAutograd, which decide about names, gradients and recompilations, without generated code."""
    monkeypatch.setattr(loading, "compile_blocks", lambda blocks: parallel.compile_blocks(blocks, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(policy: FluxPolicy, batch_size: int, *, grad: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The velocity, and the gradient of its square."""
    draw = torch.Generator().manual_seed(batch_size)
    x, sigma = torch.randn(batch_size, *policy.latent_shape(), generator=draw), torch.full((batch_size,), 0.8)
    with torch.set_grad_enabled(grad):
        velocity = policy(x, sigma, tiny.new_conditions(batch_size), 3.5)
    policy.zero_grad()
    if grad:
        velocity.square().mean().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return velocity.detach(), gradients


def assert_same(ours: FluxPolicy, theirs: FluxPolicy, batch_size: int, *, grad: bool) -> None:
    torch.testing.assert_close(
        run(ours, batch_size, grad=grad), run(theirs, batch_size, grad=grad), rtol=1e-5, atol=1e-6
    )


def test_compiled_blocks_have_the_velocity_gradient_and_names_of_plain_ones_and_are_compiled_once(models, traced):
    """Float32; rollout, trained step, evaluation; each kind of block in one piece."""
    compiled, plain = tiny.new_policy(models, compile=True), tiny.new_policy(models)
    for batch_size, grad in ((2, False), (4, True), (5, False)):
        assert_same(compiled, plain, batch_size, grad=grad)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for batch_size, grad in ((2, False), (4, True), (3, False), (7, False)):
        run(compiled, batch_size, grad=grad)
    assert counters["stats"]["unique_graphs"] == 6
    assert counters["graph_break"] == Counter()


def test_compiled_blocks_with_adapters_can_be_recomputed(models, traced):
    settings = {"adapter": Lora(rank=4, target_modules=["to_q", "proj_out"]), "gradient_checkpointing": True}
    assert_same(tiny.new_policy(models, compile=True, **settings), tiny.new_policy(models, **settings), 4, grad=True)
    assert counters["stats"]["unique_graphs"] == 2
    assert counters["graph_break"] == Counter()


def test_by_default_code_is_generated_that_computes_the_same(models):
    """Of one layer: a block's takes a C++ compiler many seconds."""
    torch._dynamo.reset()
    torch._inductor.metrics.reset()
    compiled, plain = tiny.new_policy(models), tiny.new_policy(models)
    parallel.compile_blocks([block.norm for block in compiled.transformer.single_transformer_blocks])
    # Without vector instructions, which are looked for by compiling programs.
    with torch._inductor.config.patch({"cpp.simdlen": 1, "cpp_cache_precompile_headers": False}):
        assert_same(compiled, plain, 2, grad=False)
    assert torch._inductor.metrics.generated_kernel_count > 0
    torch._dynamo.reset()


def test_dora_is_not_compiled(models):
    with pytest.raises(ValueError, match=r"DoRA cannot be compiled: set .*compile or adapter.dora to false"):
        FluxPolicy(str(models.pipeline), 32, 32, compile=True, adapter=Lora(rank=4, dora=True))


def test_training_leaves_cudnns_attention_alone(models):
    torch.backends.cuda.enable_cudnn_sdp(True)
    tiny.new_module(models).configure_model()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_another_attention_kernel_gives_the_same_velocity_and_gradient(models):
    chosen, default = tiny.new_policy(models, attention="_native_math"), tiny.new_policy(models)
    backends = {block.attn.processor._attention_backend for _, block in loading.blocks(chosen.transformer)}
    assert {backend.value for backend in backends} == {"_native_math"}
    expected = run(default, 2, grad=True)
    torch.testing.assert_close(run(chosen, 2, grad=True), expected, rtol=1e-5, atol=1e-6)


def test_a_models_attention_kernel_is_no_other_models(models, monkeypatch):
    called = []
    math = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]

    def counted(*arguments, **settings):
        called.append("math")
        return math(*arguments, **settings)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, counted)
    chosen, default = tiny.new_policy(models, attention="_native_math"), tiny.new_policy(models)
    run(default, 1, grad=False)
    assert not called
    run(chosen, 1, grad=False)
    assert len(called) == len(loading.blocks(chosen.transformer))


@pytest.mark.parametrize("name", ["nativ", "sage", "flash_hub", "_flash_3", "_native_cudnn"])
def test_a_kernel_that_is_unknown_or_cannot_train_is_refused_with_those_that_can(models, name):
    with pytest.raises(ValueError, match=f"attention is '{name}'.*choose from native, .*_native_math, flex"):
        FluxPolicy(str(models.pipeline), 32, 32, attention=name)
