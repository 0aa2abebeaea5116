"""The benchmark of a GPU on a CPU, at the size of the built-in model: every part runs, and finds what is wrong."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial, reduce
from operator import or_
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import (
    __main__ as command,
)
from benchmarks.gpu import (
    correctness,
    four_bits,
    isolated,
    one_step,
    optimizer_steps,
    page,
    parts,
    passes,
    peaks,
    recipes,
    resume,
    rollouts,
    run,
    speed,
    starts,
    two_ranks,
)
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.scale import Scale
from benchmarks.optimizers import optimizer_classes
from srpo_lightning.phases import BACKWARD, DECODE, FORWARD, ROLLOUT, enter
from tests import processes

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def scale(tmp_path, monkeypatch):
    """Processes are forked from one that has imported everything, and everything is timed once."""
    for module in (isolated, peaks, two_ranks):
        monkeypatch.setattr(module, "CONTEXT", processes.CONTEXT)
    for module in (passes, rollouts, four_bits, optimizer_steps):
        monkeypatch.setattr(module, "seconds_of", lambda function, device, _=1: passes_once(function, device))
    return Scale("cpu", "small", str(tmp_path))


def passes_once(function, device) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def numbers(found):
    """All numbers in a result."""
    for own in found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else [found]:
        if isinstance(own, Mapping | list):
            yield from numbers(own)
        elif isinstance(own, int | float):
            yield own


def last(parts) -> dict:
    """All that a function has found that tells it bit by bit."""
    return reduce(or_, parts)


def check(name: str, found: Mapping) -> str:
    """A part's result is finite, JSON, and on the page."""
    assert all(map(math.isfinite, numbers(found)))
    whole = {**json.loads(json.dumps(found)), "state": run.state_of(found), "seconds": 1.0}
    told = {"machine": {"device": "none", "versions": {}}, "size": "small", "verdict": "", "parts": {name: whole}}
    return page.page(told)


def test_a_step_is_compared_with_the_cpus_and_a_wrong_gradient_of_one_attention_is_found(scale, monkeypatch):
    """Of weights in 4 bits; the gradient of one block's attention has the wrong sign under one kernel's name."""
    make_step = correctness.make_step

    def wrong_in_one_kernel(module, config, attention):
        if attention == "_native_flash":
            attn = module.policy.transformer.transformer_blocks[0].attn
            attn.register_forward_hook(lambda _, __, output: tuple(2 * own.detach() - own for own in output))
        return make_step(module, config, attention)

    monkeypatch.setattr(correctness, "make_step", wrong_in_one_kernel)
    monkeypatch.setattr(correctness, "TRAINED", {"QLoRA": correctness.TRAINED["QLoRA"]})
    found = last(correctness.correctness(scale, ["native", "_native_flash"]))
    passed = [(row["numbers"], row["attention"], row["passed"]) for row in found["rows"]]
    assert passed == [
        ("float32", "native", True),
        ("bfloat16", "_native_math", True),
        ("bfloat16", "native", True),
        ("bfloat16", "_native_flash", False),
    ]
    assert found["passed"] is False
    wrong = found["rows"][3]
    assert found["rows"][0]["measured"]["transformer alone"] == 0
    assert wrong["measured"]["transformer alone"] > 2 * wrong["allowed"]["transformer alone"]
    assert "**no**" in check("correctness", found)


def test_a_model_that_does_not_load_is_one_wrong_row(scale, monkeypatch):
    monkeypatch.setattr(correctness, "load", lambda *_: (_ for _ in ()).throw(RuntimeError("no such layer\nmore")))
    found = last(correctness.correctness(scale))
    assert [row["trained"] for row in found["rows"]] == list(correctness.TRAINED)
    assert not found["passed"]
    assert "no such layer" in check("correctness", found)


@pytest.mark.parametrize("trained", correctness.TRAINED)
def test_each_step_of_a_model_that_was_read_once_has_the_weights_it_was_read_with(scale, trained):
    with correctness.steps(correctness.Way(trained, "float32"), scale, scale.torch_device) as step:
        first, second = step("native"), step("native")
    assert first.loss == second.loss
    for name in ("gradients", "updates", "alone"):
        own, again = getattr(first, name), getattr(second, name)
        assert all(torch.equal(own[key], again[key]) for key in own)


def test_a_gradient_that_is_not_finite_or_not_there_is_wrong(scale, monkeypatch):
    """Also of plain attention, whose rounding then allows nothing to others."""
    step = one_step.Step(1.0, {"a": torch.ones(3)}, {"a": torch.ones(3)}, {"a": torch.ones(3)})
    assert one_step.differences(step, step) == dict.fromkeys(correctness.MOST, 0)
    for gradients in ({"a": torch.tensor([1.0, torch.nan, 1.0])}, {}):
        gives = nullcontext(lambda _, own=gradients: step._replace(gradients=own))
        monkeypatch.setattr(correctness, "steps", lambda *_, own=gives: own)
        rows = list(correctness.bfloat16_rows("LoRA", ["native"], scale, step))
        assert [row["passed"] for row in rows] == [False, False]
        assert rows[1]["allowed"] == correctness.MOST


def test_a_kernel_that_does_not_run_is_told_and_fails_nothing(scale, monkeypatch):
    no_kernel = nullcontext(lambda _: (_ for _ in ()).throw(RuntimeError("No kernel.\nMore.")))
    monkeypatch.setattr(correctness, "steps", lambda *_: no_kernel)
    rows = list(correctness.bfloat16_rows("LoRA", ["native", "flex"], scale, one_step.Step(1.0, {}, {}, {})))
    assert [row["passed"] for row in rows] == [None, False, None]
    assert rows[2]["error"] == "RuntimeError: No kernel."


def test_a_resumed_run_is_the_straight_one_and_one_changed_number_is_found(scale):
    def run_here(commands, _):
        for arguments in commands:
            done = processes.start(arguments)
            assert done.returncode == 0, done.output

    found = resume.resume(scale, ["QLoRA, bfloat16"], run_here)
    row = found["runs"]["QLoRA, bfloat16"]
    assert found["passed"]
    assert row["tensors"] == row["equal"] > 100
    check("resume", found)
    folders = [Path(scale.folder) / "resume" / f"{kind}_0" for kind in ("straight", "parted")]
    path = resume.RunFolder(folders[1]).checkpoint(resume.STEPS)
    content = torch.load(path, weights_only=True)
    next(iter(content["state_dict"].values())).view(-1)[0] += 1e-6
    torch.save(content, path)
    assert resume.compare(*folders)["passed"] is False


def test_peaks_are_measured_by_phase_beside_the_predicted_ones(scale):
    found = peaks.peaks(scale, "QLoRA")
    assert found["measured"].keys() == found["predicted"].keys() >= {ROLLOUT, DECODE, BACKWARD}
    assert found["passed"], found["ratio"]
    assert found["optimizer states"] > 0
    assert f"{found['ratio']:.3f}" in check("memory: QLoRA", found)


@pytest.mark.parametrize("case", [parts.RECIPES[2], parts.VARIANTS[0]])
def test_every_kind_of_recipe_is_measured(scale, case):
    found = peaks.measured(scale, case)
    assert found["measured"].keys() >= {ROLLOUT, DECODE, BACKWARD}
    assert len(found["seconds of steps"]) == 2


def test_what_does_not_fit_says_how_far_it_came(scale, monkeypatch):
    class TooLarge:
        def __init__(self, *_):
            pass

        def __call__(self):
            enter(ROLLOUT)
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")

    monkeypatch.setattr(peaks, "new_step", TooLarge)
    found = peaks.measured(scale, "LoRA")
    assert found["out of memory"] == "in: rollout. OutOfMemoryError: CUDA out of memory."
    found |= {"predicted": {ROLLOUT: 1 << 30}, "passed": False}
    assert "out of memory in: rollout" in check("memory: LoRA", found)


def test_phases_have_seconds_and_their_share_of_the_matrix_rate_eager_and_compiled(scale, monkeypatch):
    """Without compiling, which takes minutes."""

    def eager_module(config, scale):
        eager = config.clone()
        eager[f"{speed.POLICY}.compile"] = False
        return recipes.new_module(eager, scale)

    monkeypatch.setattr(speed, "new_module", eager_module)
    found = last(speed.speed(scale, repeats=1))
    for way in ("eager", "compiled"):
        rows = dict(found[way])
        step = rows.pop("in all")
        assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
        assert rows[FORWARD]["of the matrix rate"] > 0
    rate = found["matrix rate"]
    step = found["eager"]["in all"]
    assert step["of the matrix rate"] == pytest.approx(step["model FLOPs"] / step["seconds"] / rate)
    assert found["compiled"]["in all"]["over eager"] == found["compiled"]["in all"]["seconds"] / step["seconds"]
    assert "matrix rate" in check("speed", found)


def test_the_floating_point_operations_of_a_rollout_are_those_of_its_steps(scale):
    with recipes.settings_of("LoRA", scale) as config:
        config.model.objective.init_args.num_rollout_steps = 3
        assert speed.flops_of(config) == speed.model_flops(config)


def test_a_kept_rollout_a_cache_and_sparse_guidance_are_timed(scale):
    found = rollouts.rollouts(scale)
    assert found["kept rollouts"].keys() == {f"updates_per_rollout {count}" for count in rollouts.UPDATES}
    assert found["rollout_cache"].keys() == rollouts.CACHES.keys()
    check("rollouts", found)
    guided = rollouts.guidance(scale)
    assert guided["rollouts"].keys() == rollouts.GUIDED.keys()
    check("guidance", guided)


def test_passes_are_timed_by_kernel_and_with_and_without_recomputation(scale):
    kernels = passes.attention_kernels(scale, ["native", "sage"])
    assert "error" in kernels["kernels"]["sage"]
    assert "| native |" in check("attention", kernels)
    sizes = passes.checkpointing(scale)["sizes"]
    assert sizes["64 px, without"]["peak"] > sizes["64 px, with"]["peak"] > 0
    check("checkpointing", {"sizes": sizes})


def test_layers_in_4_bits_are_compared_with_what_they_stand_for(scale, monkeypatch):
    found = four_bits.four_bits(scale)
    assert found["passed"]
    assert 0.05 < found["layers"]["64 to 96"]["rounding error"] < 0.15
    assert found["passes"].keys() == {"none", "nf4"}
    check("four bits", found)
    right = four_bits.forward_and_backward
    halved = iter((0.5, 1.0, 1.0, 1.0, 1.0))  # only the first call, of the layer in 4 bits
    monkeypatch.setattr(four_bits, "forward_and_backward", lambda *all: (right(*all)[0], right(*all)[1] * next(halved)))
    assert four_bits.layer(64, 96, 16, torch.device("cpu"))["passed"] is False


def test_the_second_start_reads_what_the_first_has_kept(scale):
    found = starts.starts(scale)
    assert found["passed"]
    assert found["files in 4 bits"] > 1 << 20
    check("starts", found)


def test_updates_of_optimizers_are_compared_with_those_of_adamw(scale, monkeypatch):
    """Without those that are compiled, which takes long."""
    few = {name: make for name, make in optimizer_classes().items() if "torch.optim" in name}
    monkeypatch.setattr(optimizer_steps, "optimizer_classes", lambda: few | {"none": None})
    found = optimizer_steps.optimizer_steps(scale)["optimizers"]
    assert found["torch.optim.AdamW"]["distance"] == 0
    assert 0 < found["torch.optim.AdamW, fused"]["distance"] < 1e-5
    assert found["none"]["error"].startswith("TypeError")
    check("optimizers", {"optimizers": found})


def test_two_ranks_make_the_step_of_one(scale):
    found = two_ranks.two_ranks(scale)
    assert found["passed"], found
    check("two ranks", found)


def test_two_ranks_that_do_not_meet_say_why(scale, monkeypatch):
    monkeypatch.setattr(two_ranks, "alone", lambda _: None)
    monkeypatch.setattr(two_ranks, "flux_stand_in", lambda *_, **__: "")
    found = two_ranks.two_ranks(scale._replace(size="full", folder="/proc/nowhere"))
    assert run.state_of(found) == run.MEASURED
    assert "could not be tried" in check("two ranks", found)


def hang(scale) -> dict:
    time.sleep(1000)
    return {}


def leave_a_process(scale) -> dict:
    return {"process": subprocess.Popen(["sleep", "1000"]).pid}


def fail(scale) -> dict:
    raise RuntimeError("first line\nsecond line")


def crash(scale) -> dict:
    os._exit(3)


def find_then_hang(scale, passed: bool = True):
    yield {"found": 1.0} | ({} if passed else {"passed": False})
    time.sleep(1000)


def give(scale, passed: bool = True) -> dict:
    return {"times": {"a": {"seconds": 1.0}}, "passed": passed}


def test_a_part_that_hangs_fails_or_crashes_leaves_the_others_alone(scale, monkeypatch):
    tried = {
        "hangs": Part("hang", 1, "", {}),
        "hangs later": Part("find_then_hang", 1, ""),
        "is wrong, then hangs": Part("find_then_hang", 1, "", {"passed": False}),
        "fails": Part("fail", 60, ""),
        "crashes": Part("crash", 60, ""),
        "works": Part("give", 60, ""),
        "is wrong": Part("give", 60, "", {"passed": False}),
        "decides nothing": Part("crash", 60, "", decides=False),
    }
    monkeypatch.setattr(run, "PARTS", tried)
    monkeypatch.setattr(run, "LEAST_S", 0.5)
    alone = run.run_alone
    monkeypatch.setattr(
        run, "run_alone", lambda function, *all, **own: alone(f"{__name__}:{function.rpartition('.')[2]}", *all, **own)
    )
    found = dict(run.run_parts(tried, scale, 100))
    states = [run.LATE, run.LATE, run.FAILED, run.FAILED, run.FAILED, run.PASSED, run.FAILED, run.MEASURED]
    assert [own["state"] for own in found.values()] == states
    assert [found[name].get("found") for name in ("hangs", "hangs later", "is wrong, then hangs")] == [None, 1, 1]
    monkeypatch.setattr(page, "PARTS", tried)
    cut_off = check("hangs later", found["hangs later"])
    assert "no result within its limit" in cut_off
    assert "found 1" in cut_off
    assert found["fails"]["error"] == "RuntimeError: first line"
    assert "status 3" in found["crashes"]["error"]
    assert [own["state"] for _, own in run.run_parts(tried, scale, 0.1)] == [run.NOT_REACHED] * len(tried)


def test_what_a_part_has_started_ends_with_it(scale):
    left = isolated.run_alone(f"{__name__}:leave_a_process", 600, Path(scale.folder) / "log", scale=scale)
    stat = Path(f"/proc/{left['process']}/stat")
    while stat.is_file() and " Z " not in stat.read_text():
        time.sleep(0.05)  # for ever, where it lives on


def test_the_command_writes_numbers_and_a_page_after_every_part(scale, monkeypatch, tmp_path, capsys):
    results = {
        "correctness": {"state": run.LATE, "seconds": 300.0, "error": isolated.LATE},
        "resume": {"state": run.PASSED, "seconds": 9.0, "runs": {"LoRA": {"equal": 3}}, "passed": True},
        "speed": {"state": run.NOT_REACHED, "seconds": 0.0},
    }
    monkeypatch.setattr(command, "run_parts", lambda *_: iter(results.items()))
    output = tmp_path / "new" / "gpu.json"
    status = partial(command.main, output=str(output), folder=scale.folder, device="cpu", size="small")
    assert status() == 0
    written = json.loads(output.read_text())
    assert written["parts"] == results
    assert written["verdict"] == "1 of 1 checks passed; out of time: correctness; not reached: speed"
    assert written["machine"]["versions"]["torch"] == torch.__version__
    told = output.with_suffix(".md").read_text()
    assert told in capsys.readouterr().out
    assert "| LoRA | 3 |" in told
    assert "## speed" not in told
    results["speed"] = {"state": run.FAILED, "seconds": 1.0, "error": "RuntimeError: no"}
    assert status() == 1
    with pytest.raises(ValueError, match="choose from correctness, resume"):
        command.main(parts=["sped"])


def test_all_parts_are_functions_whose_arguments_are_there():
    for part in PARTS.values():
        function = isolated.resolve_name(f"benchmarks.gpu.{part.function}")
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        assert names[0] == "scale"
        assert set(part.arguments) <= set(names)
        assert part.limit_s <= 600


def test_without_a_gpu_it_says_so_and_ends_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main() == 2
    assert capsys.readouterr().out == "There is no CUDA GPU here: nothing was measured.\n"


def test_the_documentation_has_every_part_with_its_limit():
    told = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    rows = re.findall(r"(?m)^\| `([^`]+)` \|.*\| (\d+)(?: each)? \|$", told)
    expected = [(name.split(":")[0], str(part.limit_s)) for name, part in PARTS.items()]
    assert [(name.split(":")[0], limit) for name, limit in rows] == [pair for pair, _ in itertools.groupby(expected)]


def test_recipes_are_those_whose_memory_is_measured():
    assert (*parts.RECIPES, *parts.VARIANTS) == tuple(recipes.CASES)


def test_the_process_that_starts_the_parts_imports_nothing_that_takes_the_gpus_memory():
    """bitsandbytes does, when it is imported, and peft and diffusers import it."""
    program = (
        "import sys, benchmarks.gpu.__main__ as _; print({'bitsandbytes', 'peft', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
