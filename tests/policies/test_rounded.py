"""Blocks in 4 bits are rounded once, and read from then on; what is damaged or another's is not."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from srpo_lightning.policies import FluxPolicy, Lora, loading, rounded
from srpo_lightning.training import nf4
from tests import tiny


def new_policy(pipeline, folder, **settings):
    settings = {"adapter": Lora(4), "quantize": "nf4", "quantize_dir": str(folder / "nf4")} | settings
    return FluxPolicy(str(pipeline), 32, 32, **settings)


def state_of(policy):
    return loading.read_in_4_bits(policy).state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def rounds(monkeypatch):
    """How many blocks were rounded."""
    found, round_block = [], loading.keep_in_4_bits

    def counted(block, double):
        found.append(block)
        round_block(block, double=double)

    monkeypatch.setattr(loading, "keep_in_4_bits", counted)
    return found


def test_what_rounding_a_block_has_freed_is_returned_before_the_next_is_read(models, rounds, monkeypatch, tmp_path):
    """Holes of all blocks together were as large as the rounded model."""
    returned = []
    monkeypatch.setattr(loading, "trim_freed_memory", lambda: returned.append(len(rounds)))
    state_of(new_policy(models.pipeline, tmp_path))
    assert returned == [1, 2]


@pytest.mark.parametrize("quantize", ["nf4", "nf4-double"])
def test_the_second_start_rounds_nothing_and_is_the_first_bit_for_bit(models, rounds, tmp_path, quantize):
    first = state_of(new_policy(models.pipeline, tmp_path, quantize=quantize))
    assert len(rounds) == 2
    assert equal(state_of(new_policy(models.pipeline, tmp_path, quantize=quantize)), first)
    assert len(rounds) == 2
    policy = new_policy(models.pipeline, tmp_path, quantize=quantize)
    policy.load()
    assert not any(tensor.is_meta for tensor in policy.transformer.state_dict().values())
    trained = {name for name, parameter in policy.transformer.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)


def test_it_draws_and_learns_as_the_first_start_does(models, tmp_path):
    gradients = []
    for _ in range(2):
        policy = new_policy(models.pipeline, tmp_path)
        policy.load()
        x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(1))
        policy(x, torch.tensor([0.9, 0.8]), tiny.new_conditions(2), 3.5).sum().backward()
        found = [p.grad for p in policy.transformer.parameters() if p.requires_grad and p.grad is not None]
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_what_a_file_has_lost_is_rounded_again(models, rounds, tmp_path, recwarn):
    first = state_of(new_policy(models.pipeline, tmp_path))
    path = next((tmp_path / "nf4").rglob("single*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert equal(state_of(new_policy(models.pipeline, tmp_path)), first)
    assert len(rounds) == 3
    assert any("is damaged, and is made again" in str(warning.message) for warning in recwarn)
    assert equal(state_of(new_policy(models.pipeline, tmp_path)), first)
    assert len(rounds) == 3


@pytest.mark.parametrize("change", ["weights", "quantize", "dtype", "version"])
def test_blocks_of_another_source_are_not_taken(models, rounds, tmp_path, monkeypatch, change):
    pipeline = tiny.write_pipeline(tmp_path / "flux")
    state_of(new_policy(pipeline, tmp_path))
    settings = {"quantize": {"quantize": "nf4-double"}, "dtype": {"dtype": "bfloat16"}}.get(change, {})
    if change == "weights":
        path = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
        save_file({name: tensor + 0.1 for name, tensor in load_file(path).items()}, path)
    if change == "version":
        monkeypatch.setattr(rounded, "version", lambda _: "another")
    state_of(new_policy(pipeline, tmp_path, **settings))
    assert len(rounds) == 4


def test_nothing_is_kept_where_nobody_asks_or_the_disk_is_full(models, rounds, tmp_path, monkeypatch, recwarn):
    first = state_of(new_policy(models.pipeline, tmp_path, quantize_dir=None))
    assert not (tmp_path / "nf4").exists()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert equal(state_of(new_policy(models.pipeline, tmp_path)), first)
    assert not list((tmp_path / "nf4").rglob("*.safetensors*"))
    (told,) = [str(warning.message) for warning in recwarn if "rounded again" in str(warning.message)]
    assert "make room" in told
    assert len(rounds) == 4


def test_weights_are_rounded_where_that_is_fast_and_are_where_they_were(monkeypatch):
    """A GPU's part is played by the CPU."""
    seen = []
    bitsandbytes = pytest.importorskip("bitsandbytes.nn")
    move = bitsandbytes.Params4bit.to

    def to(self, *arguments, **settings):
        seen.append(arguments[0])
        return move(self, "cpu", **settings)

    monkeypatch.setattr(bitsandbytes.Params4bit, "to", to)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64))
    nf4.keep_in_4_bits(layers)
    assert seen == [torch.device("cuda"), torch.device("cpu")]
    assert layers[0].weight.quant_state is not None
