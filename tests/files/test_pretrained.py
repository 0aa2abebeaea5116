"""Reading weights: what is refused, and how much memory it takes."""

import json
import random
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from srpo_lightning.encoding import Encoding
from srpo_lightning.files.pretrained import load_exactly, read_weights, safetensors_files
from srpo_lightning.policies import FluxPolicy
from tests import tiny
from tests.refusals import refused

MEASURE = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from safetensors.torch import load_file
from srpo_lightning.files.pretrained import safetensors_files, stream_into

def anonymous_mib():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
with torch.device("meta"):
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 2050, bias=False) for _ in range(16)))
fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
model.to_empty(device="cpu")
before, peak = anonymous_mib(), [0.0]
copy = torch.Tensor.copy_
def watched(self, *args, **kwargs):
    peak[0] = max(peak[0], anonymous_mib())
    return copy(self, *args, **kwargs)
torch.Tensor.copy_ = watched
files = safetensors_files(folder, "", "model")
stream_into(dict(model.named_parameters()), files)
torch.Tensor.copy_ = copy
stored = load_file(f"{folder}/model.safetensors")
rows = slice(513 * rank, min(513 * (rank + 1), 2050))
assert all(torch.equal(p.to_local(), stored[name][rows]) for name, p in model.named_parameters())
print(peak[0] - before)
"""


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_reads_its_own_rows_and_never_holds_more(tmp_path, rank):
    """128 MiB in 16 tensors on 4 ranks: 32 MiB for each, and one tensor's part of 2 MiB on its way (3 ranks of 513
    rows, the last one of 511).
    """
    tensors = {f"{i}.weight": torch.randn(2050, 1024) for i in range(16)}
    save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 32 + 2 + 6


def test_weights_of_another_model_are_refused_with_the_first_differences(tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"1 missing, first bias; 1 unexpected, first wrong\).*belongs to it"):
        load_exactly(model, {"weight": torch.zeros(2, 2), "wrong": torch.zeros(2)}, "x.pt")
    with pytest.raises(ValueError, match="1 of another shape, first weight"):
        load_exactly(model, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "x.pt")


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 cut off"])
def test_a_damaged_pickle_is_refused(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read .*copy or download"):
        read_weights(path)


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_pickle_is_executed(tmp_path, capsys):
    torch.save({"state_dict": {"a": Harmful()}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(tmp_path / "weights.pt")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_pickle_is_refused_in_one_line_wherever_the_damage_is(tmp_path):
    """As a program that ends in whatever error, also where the archive around it is whole."""
    path, chance, seen = tmp_path / "weights.pt", random.Random(0), 0
    torch.save({"a": torch.zeros(2), "b": torch.ones(3, dtype=torch.bfloat16)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (program,) = (name for name in parts if name.endswith("data.pkl"))
    for _ in range(300):
        content = bytearray(parts[program])
        for _ in range(2):
            content[chance.randrange(len(content))] = chance.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in (parts | {program: bytes(content)}).items():
                archive.writestr(name, part)
        try:
            read_weights(path)
        except ValueError as error:
            message = str(error)
            assert re.match(rf"the model in {path} cannot be read|{path} holds no state dict", message), message
            assert "\n" not in message
            seen += 1
    assert seen > 200


def test_a_bit_of_a_pickles_numbers_that_has_flipped_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.full((1000,), 0.5)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((9,), 0.5).numpy().tobytes()) + 400] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights/data/0 in it has another sum .*copy or download"):
        read_weights(path)


def test_a_compressed_pickle_which_could_grow_without_end_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/data/0", bytes(10**7))
    with pytest.raises(ValueError, match="it is compressed"):
        read_weights(path)


def test_a_rewards_harmful_pickle_ends_a_run_in_one_line(models, features, tmp_path, capsys):
    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": {"a": Harmful()}}, path)
    settings = tiny.config(models, tmp_path / "run", features)
    reward = {"pretrained": str(path), "processor": str(models.clip)}
    settings["model"]["reward"] = {"class_path": "HPSv2", "init_args": reward}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))
    refused(["fit", "--config", str(config)], f"{path} cannot be read .*copy or download", capsys)
    assert "executed" not in capsys.readouterr().out


def test_the_files_of_a_model_in_several_parts_are_found_by_its_index(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "two.safetensors")
    index = '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    files = safetensors_files(str(tmp_path), "", "model")
    assert {name: path.name for name, path in files.items()} == {"a": "one.safetensors", "b": "two.safetensors"}


@pytest.mark.parametrize("content", ["{}", "[1]", "null", '{"weight_map": {"a": 5}}', "{ damaged"])
def test_a_damaged_index_is_refused_by_its_name_and_cure(tmp_path, content):
    """Though one file is there too, as of an earlier download."""
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"^(the model in )?/\S+ .*copy or download the folder again$"):
        safetensors_files(str(tmp_path), "", "model")


def test_a_models_folder_may_begin_with_a_tilde(models, monkeypatch):
    monkeypatch.setenv("HOME", str(models.pipeline.parent))
    policy = FluxPolicy(f"~/{models.pipeline.name}", 32, 32)
    policy.load()
    assert policy.encoder(Encoding()).text.encode(["a b"])
    assert tiny.new_reward(f"~/{models.clip.name}").tokenize("a b")
