"""The host memory that each rank takes while it reads a model that is divided over two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import FluxTransformer2DModel

from tests import tiny
from tests.processes import LIMIT_S

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import json, sys, threading
import torch
from accelerate import init_empty_weights  # these take memory too, and are imported when they are needed
from diffusers import AutoencoderKL, FluxTransformer2DModel
from srpo_lightning.policies import FluxPolicy
from srpo_lightning.training.strategies import ShardedStrategy

def allocated():
    # Pages that are mapped from files, as safetensors' are, are the system's to take back.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], allocated())

torch.distributed.init_process_group("gloo")
strategy = ShardedStrategy(2)
strategy.parallel_devices = [torch.device("cpu")] * 2
strategy.make_mesh("cpu")
policy = FluxPolicy(sys.argv[1], 32, 32)
done, before = threading.Event(), allocated()
peak = [before]
watcher = threading.Thread(target=watch)
watcher.start()
policy.load(strategy.shard)
done.set()
watcher.join()
peak[0] = max(peak[0], allocated())  # a busy machine may have let the watcher see nothing
own = sum(p.to_local().nbytes for p in policy.transformer.parameters())
with open(f"{sys.argv[2]}/rank{torch.distributed.get_rank()}.json", "w") as stream:
    json.dump([peak[0] - before, own], stream)
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def pipeline(tmp_path) -> Path:
    """Its transformer has 56 million float32 weights in three files."""
    folder = tiny.write_pipeline(tmp_path / "flux")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config |= {"attention_head_dim": 128, "num_attention_heads": 8, "axes_dims_rope": [16, 56, 56]}
    FluxTransformer2DModel.from_config(config).save_pretrained(folder / "transformer", max_shard_size="100MB")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_rank_holds_more_than_its_part_of_the_weights(pipeline, tmp_path):
    whole = sum(file.stat().st_size for file in (pipeline / "transformer").glob("*.safetensors"))
    assert whole > 200_000_000
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(pipeline), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        peak, own = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert own == pytest.approx(whole / 2, rel=0.01)
        assert own < peak < 0.6 * whole
