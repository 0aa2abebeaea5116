"""`export` on the tiny models: every format of every kind of run, what its card says, and what is refused."""

import hashlib
import json
import re
import shutil
import warnings
from inspect import isabstract
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from srpo_lightning import objectives
from srpo_lightning.cli import main
from srpo_lightning.evaluation.pictures import LABEL_PX
from srpo_lightning.files.owners import partial_path
from srpo_lightning.jobs.export import job, streaming, usage
from srpo_lightning.jobs.export.formats import DiffusersFolder
from srpo_lightning.jobs.export.model_card import front_matter, method
from srpo_lightning.jobs.export.weights import Stored
from srpo_lightning.objectives import GRPO
from srpo_lightning.policies import Lora
from srpo_lightning.run_folder import RunFolder
from tests import tiny

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

KINDS = {
    "full": {},
    "lora": {"adapter": {"rank": 4, "alpha": 2.0}},
    "rslora": {"adapter": {"rank": 4, "alpha": 6.0, "rslora": True}},
    "dora": {"adapter": {"rank": 4, "alpha": 2.0, "dora": True}},
    "qlora": {"adapter": {"rank": 4}, "quantize": "nf4", "quantize_dir": None},
    "bfloat16": {"adapter": {"rank": 4}, "dtype": "bfloat16", "vae_dtype": "bfloat16"},
}
"""Of runs: what their policy is given."""

WITHOUT_EMA = "rslora"
SIGMA = torch.tensor([0.9, 0.8])


@pytest.fixture(scope="module")
def trained(models, features, tmp_path_factory):
    """The folder of a run of two steps of each kind, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("trained"), {}

    def run(kind: str) -> Path:
        if kind not in made:
            config = tiny.config(models, folder / kind, features)
            config["model"]["policy"]["init_args"] |= KINDS[kind]
            config["model"]["optimizer"]["init_args"]["lr"] = 0.01
            trainer = config["trainer"]
            trainer |= {"max_steps": 2, "logger": False, "precision": "bf16-mixed" if kind == "bfloat16" else "32-true"}
            if kind == "full":
                trainer["callbacks"] = trainer["callbacks"][:3]
            else:
                trainer |= {"limit_val_batches": 0, "callbacks": trainer["callbacks"][: kind != WITHOUT_EMA]}
            (folder / f"{kind}.yaml").write_text(json.dumps(config))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", ["srpo_lightning"])
                main(["fit", "--config", str(folder / f"{kind}.yaml")])
            made[kind] = folder / kind
        return made[kind]

    return run


def export(run: Path, output: Path, *options: str) -> Path:
    main(["export", "--config", str(run / "config.yaml"), "--output", str(output), *options])
    return output


def refused(run: Path, output: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as error:
        export(run, output, *options)
    return str(error.value)


def saved(run: Path, kind: str) -> dict[str, torch.Tensor]:
    content = torch.load(RunFolder(run).checkpoint(2), weights_only=True)
    tensors = content["state_dict" if kind == "policy" else "ema"]
    return {name.removeprefix("policy.transformer."): tensor for name, tensor in tensors.items()}


def velocity(policy, transformer) -> torch.Tensor:
    policy.transformer = transformer
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return policy(x, SIGMA, tiny.new_conditions(2), 3.5)


@pytest.mark.parametrize("kind", ["policy", "ema"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_transformer_is_the_checkpoints_bit_for_bit(trained, tmp_path, kind, dtype):
    folder = export(trained("full"), tmp_path / "out", "--weights", kind, "--dtype", dtype, "--check", "false")
    expected, other = (saved(trained("full"), k) for k in (kind, "ema" if kind == "policy" else "policy"))
    found = FluxTransformer2DModel.from_pretrained(folder, dtype=getattr(torch, dtype)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in expected.items())
    assert not all(torch.equal(expected[name], tensor) for name, tensor in other.items())
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.yaml", "config.json", "diffusion_pytorch_model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bfloat16"])
@pytest.mark.parametrize("form", ["diffusers", "single-file", "lora", "lora-comfy"])
def test_the_cards_code_draws_the_checkpoints_picture_from_every_format(trained, tmp_path, capsys, kind, form):
    run, output = trained(kind), tmp_path / "out"
    options = ["--format", form, "--dtype", "float32", "--weights", "policy" if kind == WITHOUT_EMA else "ema"]
    if kind == "full" and form.startswith("lora"):
        assert f"no adapter that --format {form} could write: choose diffusers" in refused(run, output, *options)
        return
    export(run, output, *options)
    assert "allowed mean 0.0001" in capsys.readouterr().out
    with Image.open(output / "check" / "pictures.png") as picture:
        assert picture.size == (32, 2 * (32 + LABEL_PX))


@pytest.mark.parametrize("form", ["diffusers", "lora"])
def test_what_was_trained_in_bfloat16_is_compared_in_bfloat16(trained, tmp_path, capsys, form):
    folder = export(trained("bfloat16"), tmp_path / "out", "--format", form)
    assert "allowed mean 0.1" in capsys.readouterr().out
    (file,) = folder.glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_settings_that_the_pipeline_does_not_have_make_no_difference(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoencoderKL, "enable_tiling", lambda _: pytest.fail("tiles have seams"))
    shutil.copytree(trained("full"), tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["model"]["policy"]["init_args"] |= {
        "resolution_shift": True, "quantize_timesteps": True, "vae_tiling": True,
    }  # fmt: skip
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
    export(tmp_path / "run", tmp_path / "out", "--dtype", "float32")


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_merged_adapter_is_the_one_beside_the_weights(models, trained, tmp_path, kind):
    """Against peft, which computes W x + scale B A x."""
    run = trained(kind)
    folder = export(run, tmp_path / "out", "--dtype", "float32", "--weights", "policy", "--check", "false")
    policy = tiny.new_policy(models, adapter=Lora(**KINDS[kind]["adapter"]))
    untrained = velocity(policy, policy.transformer)
    policy.transformer.load_state_dict(saved(run, "policy"), strict=False)
    expected = velocity(policy, policy.transformer)
    found = velocity(policy, FluxTransformer2DModel.from_pretrained(folder))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (untrained - expected).abs().max() > 1e-3


def test_beside_4_bits_the_adapter_goes_into_the_weights_as_they_were_before(models, trained, tmp_path):
    folder = export(trained("qlora"), tmp_path / "out", "--dtype", "float32", "--check", "false")
    found = load_file(folder / "diffusion_pytorch_model.safetensors")
    base = load_file(models.pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    changed = {name for name, tensor in base.items() if not torch.equal(found[name], tensor)}
    assert changed == {f"{name.split('.lora_')[0]}.weight" for name in saved(trained("qlora"), "ema")}


def test_large_models_are_several_files_with_an_index(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SHARD_BYTES", 20_000)
    folder = export(trained("full"), tmp_path / "out", "--dtype", "float32", "--check", "false")
    shards = sorted(folder.glob("*.safetensors"))
    names = [f"diffusion_pytorch_model-{i:05}-of-00006.safetensors" for i in range(1, 7)]
    assert [path.name for path in shards] == names
    assert all(sum(t.nbytes for t in load_file(path).values()) <= 20_000 for path in shards)
    found = FluxTransformer2DModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in saved(trained("full"), "ema").items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_written_by_tensors_is_the_one_that_safetensors_writes(tmp_path, dtype):
    draw = torch.Generator().manual_seed(0)
    tensors = {"b.weight": torch.randn(3, 5, generator=draw), "a": torch.randn(7, generator=draw)}
    stored = {name: Stored(tuple(t.shape), lambda t=t: t.mT if t.ndim == 2 else t) for name, t in tensors.items()}
    stored["b.weight"] = Stored((5, 3), stored["b.weight"].read)  # not contiguous
    streaming.write_file(tmp_path / "ours.safetensors", stored, dtype, streaming.tqdm(disable=True))
    save_file(
        {"b.weight": tensors["b.weight"].mT.contiguous().to(dtype), "a": tensors["a"].to(dtype)}, tmp_path / "theirs"
    )
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype == dtype for name, tensor in theirs.items())


@pytest.mark.parametrize(("form", "kind"), [("diffusers", "full"), ("single-file", "full"), ("lora", "lora")])
def test_the_card_says_where_the_weights_are_from_and_how_to_load_them(models, trained, tmp_path, form, kind):
    run = trained(kind)
    folder = export(run, tmp_path / "my model", "--format", form, "--check", "false")
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "diffusers"
    assert "base_model" not in yaml.safe_load(front)  # a local folder has no name on the hub
    assert "The licence of the base model applies" in body
    digest = hashlib.sha256("".join(f"a{i} b\n" for i in range(7)).encode()).hexdigest()
    assert f"| training prompts | 7, SHA-256 of the texts, a line feed after each: `{digest}` |" in body
    assert "step 2" in body
    assert (folder / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()
    if form == "single-file":
        assert "single files of the published widths alone: for it export with `--format diffusers`" in body
        assert "```python" not in body  # code that does not run is not printed
        return
    code = body.split("```python\n")[1].split("```")[0]
    assert "max_sequence_length=12," in code
    assert "torch_dtype=torch.bfloat16" in code
    namespace: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers 0.42 would rather hear dtype, older ones torch_dtype
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["picture"].size == (32, 32)


def test_the_card_compares_the_first_evaluation_with_that_of_the_exported_weights(trained, tmp_path):
    run = trained("full")
    base, *_, ema = RunFolder(run).read_metrics()
    assert (base["step"], ema["step"], ema["weights"]) == (0, 2, "ema")
    card = (export(run, tmp_path / "out", "--check", "false") / "README.md").read_text()
    assert "| | base (step 0) | exported ema (step 2) |" in card
    assert f"| reward | {base['reward']:.3f} | {ema['reward']:.3f} |" in card
    unevaluated = (export(trained("lora"), tmp_path / "lora", "--check", "false") / "README.md").read_text()
    assert "These weights were not evaluated in their run." in unevaluated


def test_a_base_model_with_a_name_on_the_hub_is_named(models, trained, tmp_path, monkeypatch):
    front = 'base_model: "black-forest-labs/FLUX.1-dev"\nbase_model_relation: '
    for name, form, relation in (("lora", "lora", "adapter"), ("full", "diffusers", "finetune")):
        monkeypatch.undo()
        original = job.card

        def named(export, module, original=original):
            export.format.policy.pretrained = "black-forest-labs/FLUX.1-dev"
            return original(export, module)

        monkeypatch.setattr(job, "card", named)
        folder = export(trained(name), tmp_path / name, "--format", form, "--check", "false")
        assert f'{front}"{relation}"' in (folder / "README.md").read_text()


def test_code_that_leaves_something_out_or_fails_is_refused(trained, tmp_path, monkeypatch):
    """As the card's did: prompts of another length than the model was trained with, modules of two dtypes."""
    original = usage.python
    for number, (line, other, message) in enumerate(
        [
            ("max_sequence_length=12,", "", "card's code draws with .* is not the checkpoint's"),
            ("num_inference_steps=2", "num_inference_steps=3", "is not the checkpoint's"),
            (
                "torch_dtype=torch.float32)\npipe",
                "torch_dtype=torch.bfloat16)\npipe",
                "fails with RuntimeError .*dtype",
            ),
        ]
    ):

        def changed(*arguments, line=line, other=other):
            assert line in original(*arguments)
            return original(*arguments).replace(line, other)

        monkeypatch.setattr(usage, "python", changed)
        output = tmp_path / str(number)
        assert re.search(message, refused(trained("full"), output, "--dtype", "float32"))
        assert not output.exists()


def test_foreign_text_in_the_code_is_a_literal(trained, tmp_path):
    run = shutil.copytree(trained("full"), tmp_path / "run")
    prompt = 'cat"); raise SystemExit("""x\\ \'\'\' ```\u2028'
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["evaluation"] = str(tmp_path / "eval.jsonl")
    (run / "config.yaml").write_text(json.dumps(config))
    folder = export(run, tmp_path / "a <b> | 'c' \"d\"", "--dtype", "float32")
    assert "# a &lt;b&gt; \\| 'c' \"d\"\n" in (folder / "README.md").read_text()


def test_what_it_was_trained_on_need_not_be_there_any_more(trained, tmp_path):
    run = shutil.copytree(trained("full"), tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= {"train": str(tmp_path / "gone.txt"), "evaluation": str(tmp_path / "gone too.txt")}
    (run / "config.yaml").write_text(json.dumps(config))
    text = (export(run, tmp_path / "out", "--dtype", "float32") / "README.md").read_text()
    assert "| training prompts | not known: their files cannot be read any more |" in text
    assert "'a cat'," in text


def test_weights_that_were_all_trained_need_none_of_the_base(models, trained, tmp_path):
    run, base = shutil.copytree(trained("full"), tmp_path / "run"), shutil.copytree(models.pipeline, tmp_path / "base")
    (base / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["policy"]["init_args"]["pretrained"] = str(base)
    (run / "config.yaml").write_text(json.dumps(config))
    folder = export(run, tmp_path / "out", "--dtype", "float32", "--check", "false")
    assert (folder / "diffusion_pytorch_model.safetensors").is_file()


def test_a_run_that_started_from_an_export_is_exported_beside_the_same_base(models, trained, features, tmp_path):
    """Of a run that trained all weights, of one that trained a LoRA beside them, and of one that went on with that."""
    first = export(trained("full"), tmp_path / "first", "--dtype", "float32", "--check", "false")
    adapter, settings = {"rank": 4, "alpha": 2.0}, {"transformer": str(first)}
    for number, more in enumerate([settings, settings | {"adapter": adapter}]):
        if number:
            lora = export(trained("lora"), tmp_path / "lora", "--format", "lora", "--check", "false")
            more["adapter"] = adapter | {"pretrained": str(lora)}
        config = tiny.config(models, tmp_path / f"run{number}", features)
        config["model"]["policy"]["init_args"] |= more
        config["trainer"] |= {"max_steps": 1, "logger": False, "limit_val_batches": 0, "callbacks": []}
        (tmp_path / "config.json").write_text(json.dumps(config))
        main(["fit", "--config", str(tmp_path / "config.json")])
        for form in ("diffusers", *(("lora", "lora-comfy") if number else ())):
            options = ["--format", form, "--dtype", "float32", "--weights", "policy"]
            folder = export(tmp_path / f"run{number}", tmp_path / f"{form}{number}", *options)
            assert str(first) in (folder / "README.md").read_text()


def test_a_moved_run_is_found_beside_its_configuration(trained, tmp_path):
    shutil.copytree(trained("full"), tmp_path / "moved")
    last = RunFolder(tmp_path / "moved").checkpoint(2)
    last.rename(last.with_name("step-00000007.ckpt"))
    folder = export(tmp_path / "moved", tmp_path / "out", "--check", "false")
    assert "`step-00000007.ckpt`" in (folder / "README.md").read_text()


def test_other_pictures_than_the_checkpoints_fail_and_stay_to_be_looked_at(trained, tmp_path, monkeypatch):
    """As if the wrong weights had been written, which diffusers reads as they are."""
    run, output = trained("full"), tmp_path / "out"
    right = job.own_frames

    def wrong(module, *others):
        for name, tensor in saved(run, "policy").items():
            module.policy.transformer.get_parameter(name).copy_(tensor)
        return right(module, *others)

    monkeypatch.setattr(job, "own_frames", wrong)
    message = refused(run, output, "--dtype", "float32")
    assert "is not the checkpoint's (mean" in message
    assert not output.exists()
    assert {path.name for path in (partial_path(output) / "check").iterdir()} == {"pictures.png"}


def test_other_weights_than_the_checkpoints_fail_although_rounding_would_hide_them(trained, tmp_path, monkeypatch):
    def damaging(self, folder):
        write(self, folder)
        path = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors["proj_out.bias"][3] *= 1.01
        save_file(tensors, path, {"format": "pt"})

    write = DiffusersFolder.write
    monkeypatch.setattr(DiffusersFolder, "write", damaging)
    message = refused(trained("full"), tmp_path / "out")
    assert "diffusers has read other weights than were written, first proj_out.bias" in message
    assert not (tmp_path / "out").exists()


def test_an_export_that_breaks_off_leaves_nothing_under_the_final_name(trained, tmp_path, monkeypatch):
    def full_disk(export, module):
        raise OSError("no space left")

    monkeypatch.setattr(job, "card", full_disk)
    with pytest.raises(OSError, match="no space left"):
        export(trained("full"), tmp_path / "out", "--check", "false")
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_together_is_refused_with_the_cure(models, trained, tmp_path):
    run, output = trained("full"), tmp_path / "out"
    assert "exists already: name another output" in refused(run, tmp_path)
    assert "holds no ema: export --weights policy" in refused(trained(WITHOUT_EMA), output)
    assert "best needs checkpoint.monitor" in refused(run, output, "--ckpt_path", "best")
    assert "does not exist: `last` takes the newest" in refused(run, output, "--ckpt_path", "/nowhere")
    assert "this checkpoint is of another policy" in refused(
        run, output, "--ckpt_path", str(RunFolder(trained("lora")).checkpoint(2))
    )
    (tmp_path / "broken.ckpt").write_bytes(b"half")
    assert "is damaged: broken.ckpt is cut off" in refused(run, output, "--ckpt_path", str(tmp_path / "broken.ckpt"))
    assert "is damaged: .metadata is missing" in refused(run, output, "--ckpt_path", str(tmp_path))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "was not written by srpo_lightning" in refused(run, output, "--ckpt_path", str(tmp_path / "other.ckpt"))
    (tmp_path / "empty").mkdir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["default_root_dir"] = str(tmp_path / "empty")
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert "holds no checkpoint: give the config.yaml of a run that has saved one" in refused(tmp_path, output)
    assert not output.exists()


def test_the_card_names_what_trained_and_what_is_drawn(models):
    module = tiny.new_module(models)
    assert method(module) == "`SRPO` ([arXiv 2509.06942](https://arxiv.org/abs/2509.06942))"
    module.objective = GRPO()
    assert method(module) == "`GRPO` ([arXiv 2505.07818](https://arxiv.org/abs/2505.07818))"
    policy = SimpleNamespace(num_frames=9, hub_tag="wan", adapter=None, start=None, pretrained=str(models.pipeline))
    head = front_matter(SimpleNamespace(format=SimpleNamespace(policy=policy)), module)
    assert 'pipeline_tag: "text-to-video"' in head
    assert 'tags: ["grpo", "text-to-video", "wan"]' in head


def test_every_objective_names_its_paper_where_it_has_one():
    classes = [own for own in vars(objectives).values() if isinstance(own, type)]
    methods = [own for own in classes if issubclass(own, objectives.Objective) and not isabstract(own)]
    assert len(methods) > 9
    assert all(re.fullmatch(r"\d{4}\.\d{5}", own.paper or "") for own in methods)
