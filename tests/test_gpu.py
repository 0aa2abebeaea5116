"""What only a CUDA GPU can show; left out where there is none."""

import json
import os

import pytest
import torch
from torch import nn

from srpo_lightning.cli import main
from srpo_lightning.policies.flux import FluxTextEncoder
from srpo_lightning.policies.parallel import leave_cudnn_attention_alone
from srpo_lightning.run_folder import RunFolder
from srpo_lightning.training import nf4
from tests import tiny

GPU = os.environ.get("SRPO_TEST_DEVICE", "cuda")
"""For trying these tests themselves without a GPU: cpu."""

pytestmark = [
    pytest.mark.skipif(GPU == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

ADAPTER = {"adapter": {"rank": 2}, "dtype": "bfloat16"}


def fit(models, features, run, *arguments, **policy) -> dict:
    """The final checkpoint of a run of four steps on the GPU."""
    settings = tiny.config(models, run, features)
    settings["model"]["policy"]["init_args"] |= policy
    settings["trainer"] |= {"accelerator": GPU, "deterministic": True, "callbacks": [], "limit_val_batches": 0}
    settings["trainer"] |= {"num_sanity_val_steps": 0, "precision": "bf16-mixed"}
    path = run.with_suffix(".yaml")
    path.write_text(json.dumps(settings))
    main(["fit", "--config", str(path), *arguments])
    return torch.load(RunFolder(run).checkpoints()[-1], map_location="cpu", weights_only=True)


@pytest.mark.parametrize("policy", [{}, ADAPTER], ids=["all weights", "LoRA"])
def test_runs_are_repeated_and_resumed_bit_for_bit_and_have_finite_gradients(
    models, features, tmp_path, capsys, policy
):
    """With trainer.deterministic: true, which refuses operations that are not."""
    whole, again = (fit(models, features, tmp_path / name, **policy) for name in ("whole", "again"))
    fit(models, features, tmp_path / "parted", "--trainer.max_steps", "2", **policy)
    parted = fit(models, features, tmp_path / "parted", "--ckpt_path", "last", **policy)
    for other in (again, parted):
        assert all(torch.equal(other["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())
    assert "not finite" not in capsys.readouterr().out


def test_the_gradient_in_bfloat16_is_that_of_plain_attention(models):
    """Of the kernel that torch chooses, to the rounding of bfloat16."""
    leave_cudnn_attention_alone()
    policy = tiny.new_policy(models, dtype="bfloat16").to(GPU)
    conditions = tiny.new_conditions(2)
    conditions = conditions._replace(text=conditions.text.each(lambda t: t.to(GPU)), indices=conditions.indices.to(GPU))
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(1)).to(GPU)

    def gradient() -> torch.Tensor:
        policy.zero_grad()
        with torch.autocast(GPU, torch.bfloat16):
            policy(x, torch.full((2,), 0.8, device=GPU), conditions, 3.5).square().mean().backward()
        return torch.cat([p.grad.float().flatten() for p in policy.parameters() if p.grad is not None])

    chosen = gradient()
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        plain = gradient()
    assert (chosen - plain).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantized_text_encoder_gives_nearly_the_same_features(models, quantize):
    whole, small = (
        FluxTextEncoder(str(models.pipeline), dtype=torch.bfloat16, device=GPU, quantize=name).encode(["a b"])[0]
        for name in ("none", quantize)
    )
    expected = whole["prompt_embeds"].float()
    assert (small["prompt_embeds"].float() - expected).norm() < 0.4 * expected.norm()


def test_weights_in_4_bits_are_the_same_rounded_here_and_moved_or_there():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 96, dtype=torch.bfloat16)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    nf4.keep_in_4_bits(layers[0])
    here, there = layers[0].to(GPU), layers[1].to(GPU)
    nf4.keep_in_4_bits(there)
    x = torch.randn(3, 64, device=GPU, dtype=torch.bfloat16)
    torch.testing.assert_close(here(x), there(x))
