"""A second family in one file, aura_flow.py: it draws what diffusers draws, and every command takes it."""

from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from srpo_lightning import flow
from srpo_lightning.batch import Conditions, Text
from srpo_lightning.cli import main
from srpo_lightning.data import PromptData
from srpo_lightning.draws import Draws, sample_noise
from srpo_lightning.encoding import Encoding
from srpo_lightning.objectives import GRPO
from srpo_lightning.policies import FluxPolicy, Lora
from srpo_lightning.policies.flux import FluxTextEncoder
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.families.aura_flow import AuraFlowPolicy

PROMPTS = ["a cat", "b"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    text = UMT5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    folder = tmp_path_factory.mktemp("aura")
    AuraFlowPipeline(
        tokenizer=tiny.t5_tokenizer(),
        text_encoder=UMT5EncoderModel(text),
        vae=tiny.kl_vae(shift_factor=None),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_its_sampler_draws_the_pipelines_pictures(pipeline, guidance, size):
    policy = AuraFlowPolicy(str(pipeline), *size)
    policy.load()
    text = policy.encoder(Encoding()).text
    conditions = Conditions(
        PROMPTS,
        Text.collate(text.encode(PROMPTS), text.ragged),
        torch.arange(2),
        unconditional=Text.collate(text.encode([text.negative]), text.ragged),
    )
    noise = sample_noise(0, [0, 1], policy.latent_shape())
    with torch.no_grad():
        latents = flow.integrate(lambda x, s: policy(x, s, conditions, guidance), noise, policy.sigmas(4))
        pictures = policy.decode(latents)
    theirs = AuraFlowPipeline.from_pretrained(pipeline)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPTS,
        height=size[0],
        width=size[1],
        num_inference_steps=4,
        guidance_scale=guidance,
        max_sequence_length=tiny.MAX_TOKENS,
        latents=noise,
        output_type="pt",
    ).images
    torch.testing.assert_close(pictures, expected, rtol=0, atol=2e-5)


def test_a_padded_batch_equals_its_samples_alone(pipeline):
    policy = AuraFlowPolicy(str(pipeline), 32, 32)
    policy.load()
    text = policy.encoder(Encoding()).text
    items = text.encode(PROMPTS)
    assert len({len(item["prompt_embeds"]) for item in items}) == 2
    x, sigma = torch.randn(2, *policy.latent_shape()), torch.tensor([0.8, 0.8])
    with torch.no_grad():
        together = policy(x, sigma, Conditions(PROMPTS, Text.collate(items, text.ragged), torch.arange(2)), 1.0)
        for row, item in enumerate(items):
            alone = Conditions(PROMPTS[row : row + 1], Text.collate([item], text.ragged), torch.arange(1))
            torch.testing.assert_close(
                policy(x[row : row + 1], sigma[:1], alone, 1.0)[0], together[row], atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("kind", ["conditional", "detached"])
def test_a_trained_step_has_one_gradient_with_or_without_the_guidance(pipeline, kind):
    """With the pass of no prompt detached, the gradient is that of the conditional pass times the guidance."""
    policy = AuraFlowPolicy(str(pipeline), 32, 32, trained_guidance=kind)
    policy.load()
    text = policy.encoder(Encoding()).text
    none = Text.collate(text.encode([""]), text.ragged)
    conditions = Conditions(["a"], Text.collate(text.encode(["a"]), text.ragged), torch.arange(1), unconditional=none)
    x, sigma = torch.randn(1, *policy.latent_shape()), torch.tensor([0.7])
    weight = policy.transformer.proj_out.weight
    velocity = policy(x, sigma, conditions, 4.0)
    (gradient,) = torch.autograd.grad(velocity.sum(), weight)
    alone = policy(x, sigma, conditions, 1.0)
    (expected,) = torch.autograd.grad(alone.sum(), weight)
    torch.testing.assert_close(gradient, (4.0 if kind == "detached" else 1.0) * expected)
    with torch.no_grad():
        guided = policy(x, sigma, conditions, 4.0)
    assert torch.allclose(guided, velocity, atol=1e-5) == (kind == "detached")


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["conditional", "detached"])
def test_grpo_trains_the_steps_that_it_has_drawn_or_refuses(pipeline, models, kind, guidance):
    """Without the pass of no prompt a trained step has another probability than when it was drawn."""
    policy = AuraFlowPolicy(str(pipeline), 32, 32, trained_guidance=kind)
    objective = GRPO(num_steps=4, group_size=2, guidance=guidance)
    if kind == "conditional" and guidance != 1:
        with pytest.raises(ValueError, match=r"set model.policy.init_args.trained_guidance to detached"):
            objective.check_policy(policy)
        return
    objective.check_policy(policy)
    policy.load()
    text = policy.encoder(Encoding()).text
    none = Text.collate(text.encode([""]), text.ragged)
    features = Text.collate(text.encode(PROMPTS), text.ragged)
    conditions = Conditions(PROMPTS, features, torch.arange(2), unconditional=none)
    rollout = objective.rollout(policy, conditions, Draws(0))
    outcome = objective.loss(policy, tiny.new_reward(models.clip), conditions, rollout, Draws(0))
    assert float(outcome.scalars["ratio_error"]) < 1e-4


def test_grpo_refuses_rollouts_that_leave_guidance_out_of_some_steps(pipeline):
    policy = AuraFlowPolicy(str(pipeline), 32, 32, trained_guidance="detached", guidance_every=2)
    with pytest.raises(ValueError, match="without guidance_every and guided_steps, or guidance to 1"):
        GRPO(num_steps=4, group_size=2, guidance=4.0).check_policy(policy)


@pytest.mark.parametrize(
    ("settings", "second"),
    [({}, "cccc"), ({"guidance_every": 2}, "ckck"), ({"guided_steps": 2}, "cc--"), ({"guided_steps": 0}, "----")],
    ids=str,
)
def test_a_rollout_takes_the_second_pass_at_the_steps_that_ask_for_it(pipeline, settings, second):
    """c: it is computed, k: its difference is kept from the step before, -: the step is not guided."""
    policy = AuraFlowPolicy(str(pipeline), 32, 32, **settings)
    policy.load()
    text = policy.encoder(Encoding()).text
    conditions = Conditions(["a"], Text.collate(text.encode(["a"]), text.ragged), torch.arange(1))
    none = conditions._replace(text=Text.collate(text.encode([""]), text.ragged))
    conditions = conditions._replace(unconditional=none.text)
    passes = []
    policy.transformer.register_forward_hook(lambda *_: passes.append(1))
    sigma = torch.tensor([0.7])
    with torch.no_grad():
        for _ in range(2):  # the second rollout begins anew
            kept = None
            with policy.rolling_out():
                for kind in second:
                    x = torch.randn(1, *policy.latent_shape())
                    passes.clear()
                    found = policy(x, sigma, conditions, 4.0)
                    assert len(passes) == (2 if kind == "c" else 1)
                    alone, without = policy(x, sigma, conditions, 1.0), policy(x, sigma, none, 1.0)
                    kept = alone - without if kind == "c" else kept
                    expected = alone if kind == "-" else alone + 3.0 * kept
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        passes.clear()
        policy(x, sigma, conditions, 4.0)
        assert len(passes) == 2, "samples are guided at each step"


def test_what_is_left_out_of_guidance_is_refused_where_there_is_no_second_pass(models):
    with pytest.raises(ValueError, match=r"guided_steps is set, but FluxPolicy makes one pass, .*: leave both out"):
        FluxPolicy(str(models.pipeline), 32, 32, guided_steps=3)


class GuidedFluxEncoder(FluxTextEncoder):
    negative = ""


class GuidedFlux(FluxPolicy):
    text_encoder = GuidedFluxEncoder


def test_either_pass_of_a_rollout_has_a_cache_of_its_own(tmp_path):
    """With a threshold that everything is below, both passes of a first step are computed all the same."""
    policy = GuidedFlux(str(tiny.write_pipeline(tmp_path, guidance_embeds=False)), 32, 32, rollout_cache=1e9)
    policy.load()
    conditions = tiny.new_conditions(2)
    conditions = conditions._replace(unconditional=tiny.new_conditions(1).text)
    x, sigma = torch.randn(2, *policy.latent_shape()), torch.tensor([0.8, 0.8])
    with torch.no_grad():
        expected = policy(x, sigma, conditions, 4.0)
        with policy.rolling_out():
            torch.testing.assert_close(policy(x, sigma, conditions, 4.0), expected)


def test_sizes_are_whole_cells_of_the_policys_own(models, features, tmp_path):
    def large(wanted):
        return tiny.encoder_of(models)(wanted)._replace(cell=32)

    train = tmp_path / "train.jsonl"
    train.write_text('{"prompt": "a", "width": 64, "height": 48}\n{"prompt": "b"}\n')
    with pytest.raises(
        ValueError, match=r"data.sizes\[1\]: 48 x 32 pixels, of which 32 does not divide 48: make it 32"
    ):
        PromptData(str(train), large, str(models.evaluation), sizes=[(32, 32), (48, 32)], cache_dir=str(features))
    data = PromptData(str(train), large, str(models.evaluation), cache_dir=str(features))
    with pytest.raises(ValueError, match="the picture of 'a': 64 x 48 pixels, of which 32 does not divide 48"):
        data.read(trains=True)


def config_of(pipeline: Path, models: tiny.Models, run: Path, folder: Path, **policy) -> Path:
    settings = tiny.config(models, run, folder / "features")
    settings["model"]["policy"] = {
        "class_path": "tests.families.aura_flow.AuraFlowPolicy",
        "init_args": {"pretrained": str(pipeline), "height": 32, "width": 32, **policy},
    }
    path = folder / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("adapter", [None, {"rank": 4}], ids=["full", "lora"])
def test_it_is_cached_estimated_trained_resumed_and_exported_by_the_command_line(
    pipeline, models, tmp_path, capsys, adapter
):
    policy = {} if adapter is None else {"adapter": adapter}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    config = str(config_of(pipeline, models, whole, tmp_path, **policy))
    main(["cache", "--config", config])
    assert "11 prompts in" in capsys.readouterr().out  # ten, and the one that guidance moves away from
    main(["estimate", "--config", config])
    assert "fits a device of" in capsys.readouterr().out
    main(["fit", "--config", config])
    second = str(config_of(pipeline, models, broken, tmp_path, **policy))
    main(["fit", "--config", second, "--trainer.max_steps", "2"])
    main(["fit", "--config", second, "--ckpt_path", "last"])
    ends = [torch.load(RunFolder(run).checkpoint(4), weights_only=True) for run in (whole, broken)]
    assert ends[0]["state_dict"].keys() == ends[1]["state_dict"].keys()
    for name, tensor in ends[0]["state_dict"].items():
        assert torch.equal(tensor, ends[1]["state_dict"][name]), name
    out = tmp_path / "exported"
    arguments = ["--config", str(whole / "config.yaml"), "--dtype", "float32", "--weights", "policy"]
    main(["export", *arguments, "--output", str(out), "--format", "lora" if adapter else "diffusers"])
    if adapter:
        assert (out / "pytorch_lora_weights.safetensors").is_file()
    else:
        theirs = diffusers.AuraFlowTransformer2DModel.from_pretrained(out)
        trained = {n.removeprefix("policy.transformer."): t for n, t in ends[0]["state_dict"].items()}
        assert all(torch.equal(p, trained[n]) for n, p in theirs.named_parameters())
    assert "AuraFlowPipeline" in (out / "README.md").read_text()
    with pytest.raises(SystemExit, match="has no names for a single file"):
        main(["export", *arguments, "--output", str(tmp_path / "single"), "--format", "single-file"])


def test_its_adapter_takes_every_projection_of_the_blocks(pipeline):
    policy = AuraFlowPolicy(str(pipeline), 32, 32, adapter=Lora(rank=2))
    names = {n.split(".lora_")[0] for n, p in policy.outline().named_parameters() if p.requires_grad}
    linear = {n for n, m in policy.empty_transformer().named_modules() if isinstance(m, torch.nn.Linear)}
    assert names == {n for n in linear if "transformer_blocks" in n and ".norm" not in n}
    assert names
