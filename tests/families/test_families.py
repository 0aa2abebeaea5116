"""Every family against its pipeline in diffusers, and through every way of training."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves

from srpo_lightning import flow
from srpo_lightning.batch import Conditions, Text
from srpo_lightning.cli import main
from srpo_lightning.draws import Draws, sample_noise
from srpo_lightning.encoding import Encoding
from srpo_lightning.objectives import GRPO, SRPO, ControlWords, DirectAlign, DRaFT, LeapAlign
from srpo_lightning.policies import adapters, loading, parallel
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.rewards import Reward
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.families.case import Case
from tests.families.cases import CASES
from tests.ranks.test_sharded import config as config_of_ranks
from tests.ranks.test_sharded import fit, whole

PROMPTS = ["a cat", "3 dogs, running in the park"]
SIZES = [(32, 32), (48, 32)]
GUIDED = 5.0


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    case = CASES[request.param]
    return case._replace(folder=case.write(tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def items(case) -> list[dict[str, torch.Tensor]]:
    """Features of the prompts, and of the text that guidance moves away from."""
    text = case.unread().encoder(Encoding()).text
    return text.encode([*PROMPTS, *([] if text.negative is None else [text.negative])])


def conditions_of(case, items, rows: slice) -> Conditions:
    """Of some of the prompts."""
    ragged = case.unread().text_encoder.ragged
    prompts, own = PROMPTS[rows], items[: len(PROMPTS)][rows]
    none = Text.collate(items[len(PROMPTS) :], ragged) if items[len(PROMPTS) :] else None
    return Conditions(prompts, Text.collate(own, ragged), torch.arange(len(prompts)), unconditional=none)


@pytest.fixture(scope="module")
def conditions(case, items) -> Conditions:
    return conditions_of(case, items, slice(None))


@pytest.fixture(scope="module")
def pipe(case):
    pipe = getattr(diffusers, case.unread().pipeline_class).from_pretrained(case.folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_of(policy: FlowPolicy, number: int = len(PROMPTS)) -> torch.Tensor:
    return sample_noise(0, range(number), policy.latent_shape())


@torch.no_grad()
def drawn(policy: FlowPolicy, conditions: Conditions, guidance: float) -> torch.Tensor:
    noise = noise_of(policy, conditions.batch_size)
    latents = policy.integrate(lambda x, s: policy(x, s, conditions, guidance), noise, 4)
    return policy.decode(latents)


def expected(pipe, case: Case, policy: FlowPolicy, guidance: float) -> torch.Tensor:
    length = policy.encoder(Encoding()).text.max_sequence_length
    arguments = dict(policy.pipeline_arguments(guidance, length))
    if "negative_prompt" in arguments:  # of each
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(PROMPTS)
    drawn = pipe(
        prompt=list(PROMPTS),
        height=policy.size[0],
        width=policy.size[1],
        num_inference_steps=4,
        latents=case.latents(noise_of(policy), policy.size),
        **arguments | {"output_type": "pt"},
    )
    return drawn.images if hasattr(drawn, "images") else drawn.frames[:, 0]


@pytest.mark.parametrize("size", SIZES)
def test_its_sampler_draws_the_pipelines_pictures(case, conditions, pipe, size):
    policy = case.new(size)
    for guidance in case.guidances:
        found = drawn(policy, conditions, guidance)
        torch.testing.assert_close(found, expected(pipe, case, policy, guidance), rtol=0, atol=1e-5)


def test_pictures_show_every_mistake(case, conditions, pipe):
    right = expected(pipe, case, case.new(), case.guidances[-1])
    for name, mistaken in case.mistakes.items():
        pictures = drawn(case._replace(policy=mistaken).new(), conditions, case.guidances[-1])
        assert (pictures - right).abs().max() > 1e-3, name


def test_features_are_the_pipelines_bit_for_bit_without_padding_that_nobody_reads(case, items, pipe):
    encoder = case.unread().encoder(Encoding()).text
    with torch.no_grad():
        theirs = case.features(pipe, PROMPTS, encoder.max_sequence_length)
    for ours, own in zip(items[: len(PROMPTS)], theirs, strict=True):
        assert ours.keys() == own.keys()
        assert all(torch.equal(ours[name], own[name]) for name in ours)
    largest = encoder.shapes
    for name, shape in largest.items():
        short, long = items[0][name].shape, items[1][name].shape
        assert short[0] < long[0] <= shape[0] if name in encoder.ragged else short == long == shape


def test_a_padded_batch_equals_its_samples_alone(case, items, conditions):
    policy, sigma = case.new(), torch.tensor([0.8, 0.7])
    x = torch.randn(2, *policy.latent_shape())
    with torch.no_grad():
        together = policy(x, sigma, conditions, case.guidances[-1])
        for row in range(2):
            own = slice(row, row + 1)
            alone = policy(x[own], sigma[own], conditions_of(case, items, own), case.guidances[-1])
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


def step_of(policy: FlowPolicy, conditions: Conditions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A velocity, and the gradient of its square."""
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    velocity = policy(x, torch.tensor([0.8, 0.7]), conditions, 1.0)
    velocity.square().mean().backward()
    return velocity.detach(), {name: p.grad for name, p in policy.transformer.named_parameters()}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:`torch.jit")
@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"compile": True}], ids=lambda own: next(iter(own))
)
def test_recomputed_and_compiled_blocks_have_the_same_gradients_of_every_weight(
    case, conditions, monkeypatch, settings
):
    monkeypatch.setattr(loading, "compile_blocks", lambda blocks: parallel.compile_blocks(blocks, backend="aot_eager"))
    torch._dynamo.reset()
    (velocity, gradients), (plain, same) = (step_of(case.new(**own), conditions) for own in (settings, {}))
    torch._dynamo.reset()
    assert all((same[name] is not None) == p.requires_grad for name, p in case.unread().outline().named_parameters())
    torch.testing.assert_close((velocity, gradients), (plain, same), rtol=1e-5, atol=1e-7)


class Red(Reward):
    """How red a picture is, more so under some texts."""

    def forward(self, images, texts):
        likes = torch.tensor([2.0 if text.startswith("red") else 1.0 for text in texts])
        return likes * images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


OBJECTIVES = {
    "srpo": SRPO(ControlWords(["red"], ["grey"]), num_rollout_steps=3, guidance=GUIDED),
    "leap": LeapAlign(num_steps=3, guidance=GUIDED),
    "draft-lv": DRaFT(num_steps=3, num_variants=2, guidance=GUIDED),
    "grpo": GRPO(num_steps=3, group_size=8, guidance=1.0),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_objectives_raise_a_reward(case, conditions, objective):
    """Of pictures from other noise without guidance, by more than three standard errors of the mean gain."""
    policy, reward, many = case.new(), Red(), conditions.repeat(8)
    before = reward(drawn(policy, many, 1.0), many.prompts)
    optimizer = torch.optim.AdamW(policy.transformer.parameters(), lr=3e-3)
    for step in range(14):
        rollout = objective.rollout(policy, conditions, Draws(0, step))
        optimizer.zero_grad()
        objective.loss(policy, reward, conditions, rollout, Draws(0, step)).loss.backward()
        optimizer.step()
    gain = reward(drawn(policy, many, 1.0), many.prompts) - before
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


def test_the_surrogates_gradient_is_that_of_plain_autograd(case, conditions):
    """Through one step, the VAE and the reward at once."""
    objective, policy, draws = DirectAlign(margin=9.0, guidance=1.0), case.new(), Draws(0, 3)
    x0, noise = torch.randn(2, 2, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    objective.num_rollout_steps = 1
    rollout = objective.rollout(policy, conditions, draws)._replace(x0=x0, noise=noise)
    loss = objective.loss(policy, Red(), conditions, rollout, draws).loss
    weights = [p for p in policy.transformer.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, weights)
    a, b, _ = objective.branches(objective.positions(2, draws), flow.schedule(50, 3.0)).to(x0)
    x = flow.inject(x0, noise, a)
    x0_hat = flow.recover(flow.step(x, policy(x, a, conditions, 1.0), a, b), noise, b)
    plain = torch.relu(9.0 - Red()(policy.decode(x0_hat), PROMPTS)).mean()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found, torch.autograd.grad(plain, weights), rtol=1e-4, atol=1e-7)


def test_a_single_file_goes_through_diffusers_converter_and_comes_back_the_same(case, tmp_path):
    policy = case.new()
    names = policy.single_file
    own = {name: tensor.detach() for name, tensor in adapters.base_tensors(policy.transformer).items()}
    file = {name: names.joined(name, [own[part] for part in parts]) for name, parts in names.sources(own).items()}
    for name, parts in names.sources(own).items():
        assert names.shape(name, [tuple(own[part].shape) for part in parts]) == tuple(file[name].shape)
        divided = names.divided(name, file[name], [len(own[part]) for part in parts])
        assert all(torch.equal(a, own[part]) for a, part in zip(divided, parts, strict=True))
    assert names.keeps_names or file.keys() != own.keys()
    if not policy.reads_single_file({name: tuple(tensor.shape) for name, tensor in own.items()}):
        return  # its converter knows one width: tests/policies/test_single_file.py
    save_file({name: tensor.clone() for name, tensor in file.items()}, tmp_path / "file.safetensors")
    theirs = policy.diffusers_class.from_single_file(
        str(tmp_path / "file.safetensors"), config=str(case.folder), subfolder="transformer", torch_dtype=torch.float32
    )
    assert all(torch.equal(tensor, own[name]) for name, tensor in theirs.state_dict().items())


def test_what_it_cannot_do_is_refused_with_the_cure(case):
    for name, (value, cure) in case.refused.items():
        with pytest.raises(ValueError, match=rf"^{name} is .*: set it to {cure}$"):
            case.unread(**{name: value})


def write_config(case: Case, models: tiny.Models, run: Path, folder: Path, *, ranks: int = 1, **policy) -> Path:
    path = config_of_ranks(models, folder / "features", run, ranks)
    settings = json.loads(path.read_text())
    settings["model"]["policy"] = {
        "class_path": f"srpo_lightning.policies.{case.policy.__name__}",
        "init_args": {"pretrained": str(case.folder), "height": 32, "width": 32, **policy},
    }
    settings["model"]["objective"]["init_args"]["rollout_guidance"] = case.guidances[-1]
    settings["model"]["sample_guidance"] = case.guidances[-1]
    if "quantize" in policy:
        settings["model"]["optimizer"] = {
            "class_path": "bitsandbytes.optim.AdamW8bit",
            "init_args": {"lr": 1e-3, "min_8bit_size": 32},
        }
    path.write_text(json.dumps(settings))
    return path


def test_an_adapter_beside_four_bits_is_trained_with_states_of_eight_resumed_and_exported_by_the_command_line(
    case, models, tmp_path, capsys
):
    """The export draws with the pipeline what the checkpoint draws, by the code of its model card."""
    policy = {"adapter": {"rank": 4}, "quantize": "nf4", "quantize_dir": str(tmp_path / "nf4")}
    unbroken, broken = (write_config(case, models, tmp_path / name, tmp_path, **policy) for name in ("whole", "broken"))
    main(["estimate", "--config", str(unbroken)])
    assert "fits a device of" in capsys.readouterr().out
    main(["fit", "--config", str(unbroken)])
    main(["fit", "--config", str(broken), "--trainer.max_steps", "2"])
    main(["fit", "--config", str(broken), "--ckpt_path", "last"])
    ends = [torch.load(RunFolder(tmp_path / run).checkpoint(4), weights_only=True) for run in ("whole", "broken")]
    states = [t for t in tree_leaves(ends[0]["optimizer_states"]) if isinstance(t, torch.Tensor)]
    assert any(state.dtype == torch.uint8 for state in states)
    weights, resumed = (end["state_dict"] for end in ends)
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())
    arguments = ["--config", str(tmp_path / "whole" / "config.yaml"), "--dtype", "float32"]
    main(["export", *arguments, "--format", "lora", "--output", str(tmp_path / "lora")])
    assert f"{case.unread().pipeline_class}.from_pretrained" in (tmp_path / "lora" / "README.md").read_text()


def test_two_sharded_ranks_train_what_one_trains_and_both_exports_open_in_diffusers(case, models, tmp_path):
    """The export compares what diffusers reads bit for bit, and its picture with the checkpoint's."""
    main(["fit", "--config", str(write_config(case, models, tmp_path / "one", tmp_path))])
    fit(write_config(case, models, tmp_path / "two", tmp_path, ranks=2))
    one, two = (whole(tmp_path / run, 4)["state_dict"] for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():  # Adam divides rounding of small gradients by their size; a step is 1e-3
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    arguments = ["--config", str(tmp_path / "two" / "config.yaml"), "--dtype", "float32", "--weights", "policy"]
    for form in ("diffusers", "single-file"):
        main(["export", *arguments, "--format", form, "--output", str(tmp_path / form)])
        assert "allowed mean" in (tmp_path / form / "README.md").read_text()
