"""The relative reward with other prompts in the negative place, against its formula and what it is for."""

import json
from itertools import pairwise

import pytest
import torch

from srpo_lightning.batch import Conditions
from srpo_lightning.cli import main
from srpo_lightning.draws import Draws
from srpo_lightning.objectives import SRPO, ControlWords, Relative
from srpo_lightning.rewards import Reward
from srpo_lightning.run_folder import RunFolder
from tests import tiny

POOL = [f"p{i}" for i in range(9)]
WORDS = ControlWords(["good"], ["bad"])


def of(*prompts: str) -> Conditions:
    return tiny.new_conditions(len(prompts))._replace(prompts=list(prompts))


def prepared(others: int, words: ControlWords = WORDS, **settings) -> Relative:
    form = Relative(words, others=others, **settings)
    form.prepare(POOL)
    return form


class Additive(Reward):
    """A style by the word, a subject by the prompt, and a bias that no text explains: each a channel of the picture."""

    def forward(self, images, texts):
        style, subject, bias = images.mean((2, 3)).unbind(1)
        likes = torch.tensor([1.0 if "good" in text else -1.0 for text in texts])
        shows = torch.tensor([1.0 if text.endswith("p0") else 0.0 for text in texts])
        return likes * style + shows * subject + 3 * bias


def test_each_column_holds_other_prompts_of_the_whole_set_under_the_negative_word():
    towards, *away = prepared(4).texts(of("p0", "p1"), Draws(0))
    assert towards == ["good. p0", "good. p1"]
    assert len(away) == 4
    drawn = [[text.removeprefix("bad. ") for text in column] for column in away]
    assert all(column[row] != f"p{row}" for column in drawn for row in (0, 1))
    assert {text for column in drawn for text in column} - {"p0", "p1"}


def test_every_other_prompt_is_drawn_and_the_own_never():
    form = prepared(3)
    seen = [column[0] for step in range(200) for column in form.texts(of("p4"), Draws(0, step))[1:]]
    counts = {prompt: seen.count(f"bad. {prompt}") for prompt in POOL}
    assert counts.pop("p4") == 0
    assert min(counts.values()) > 600 / 8 / 2


def test_a_prompt_meets_the_same_others_however_the_step_is_divided():
    form = prepared(2)
    _, *together = form.texts(of("p0", "p1", "p2"), Draws(5, 7))
    for row, rank in enumerate((0, 3, 1)):
        _, *alone = form.texts(of(f"p{row}"), Draws(5, 7, rank=rank, micro_batch=row, num_ranks=4))
        assert [column[0] for column in alone] == [column[row] for column in together]
    steps = [form.texts(of("p0"), Draws(5, step))[1:] for step in range(20)]
    assert any(one != other for one, other in pairwise(steps))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_reward_is_the_formula(sign):
    form, images = prepared(3, extra_weight=0.25), torch.rand(2, 3, 4, 4)
    conditions, reward = of("p0", "p1"), Additive()
    found = form(reward, images, conditions, Draws(0), signs=[sign, sign])
    towards, *away = form.texts(conditions, Draws(0))
    positive, negative = reward(images, towards), torch.stack([reward(images, own) for own in away]).mean(0)
    expected = 1.25 * positive - negative if sign > 0 else 1.25 * negative - positive
    torch.testing.assert_close(found, expected)


def test_what_no_text_explains_cancels_and_the_subject_stays_where_the_published_form_loses_it():
    def gradient(form: Relative) -> list[float]:
        images = torch.rand(1, 3, 4, 4, requires_grad=True)
        total = form(Additive(), images, of("p0"), Draws(0), weight=torch.zeros(1)).sum()
        return torch.autograd.grad(total, images)[0].sum((0, 2, 3)).tolist()

    assert gradient(Relative(WORDS)) == pytest.approx([2.0, 0.0, 0.0])
    assert gradient(prepared(3)) == pytest.approx([2.0, 1.0, 0.0])
    assert gradient(prepared(3, ControlWords(["good"], []))) == pytest.approx([2.0, 1.0, 0.0])


def test_without_a_negative_word_the_others_stand_as_they_are():
    _, *away = prepared(2, ControlWords(["good"], [])).texts(of("p0"), Draws(0))
    assert all(column[0] in POOL for column in away)


def test_a_prompts_own_negative_prompt_stands_in_for_the_others():
    conditions = of("p0", "p1")._replace(negative_prompts=[None, "blurry"])
    _, *away = prepared(2).texts(conditions, Draws(0))
    assert [column[1] for column in away] == ["blurry", "blurry"]
    assert all(column[0].startswith("bad. p") for column in away)


def test_what_could_not_train_is_refused():
    with pytest.raises(ValueError, match=r"control_words.negative is \[\]: give at least one word"):
        Relative(ControlWords(["good"], []))
    with pytest.raises(ValueError, match=r"others is 2, but there is but one training prompt: give more"):
        Relative(WORDS, others=2).prepare(["a", "a"])


def test_before_training_others_are_of_the_batch_so_that_memory_can_be_predicted():
    assert Relative(WORDS, others=1).texts(of("a", "b"), Draws(0))[1] == ["bad. b", "bad. a"]
    assert Relative(WORDS, others=1).texts(of("a"), Draws(0))[1] == ["bad. a"]


@pytest.mark.parametrize("kind", ["SRPO", "LeapAlign"])
def test_a_run_with_others_goes_on_as_if_it_had_not_been_stopped(models, tmp_path, features, kind):
    words = {"control_words": {"positive": ["x"], "negative": ["z"]}, "others": 2}
    settings = {
        "SRPO": words | {"num_rollout_steps": 2},
        "LeapAlign": {
            "form": {"class_path": "srpo_lightning.objectives.Relative", "init_args": words},
            "num_steps": 3,
        },
    }[kind]
    runs = []
    for name, stops in (("whole", [4]), ("broken", [2, 4])):
        config = tiny.config(models, run := tmp_path / name, features)
        config["model"]["objective"] = {"class_path": f"srpo_lightning.objectives.{kind}", "init_args": settings}
        config["trainer"]["callbacks"] = []
        (path := tmp_path / f"{name}.yaml").write_text(json.dumps(config))
        for number, stop in enumerate(stops):
            resumed = ["--ckpt_path", "last"] if number else []
            main(["fit", "--config", str(path), "--trainer.max_steps", str(stop), *resumed])
        runs.append(torch.load(RunFolder(run).checkpoint(4), weights_only=True)["state_dict"])
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_srpo_hands_the_number_of_others_to_its_form():
    assert SRPO(WORDS, others=3).form.others == 3
    assert SRPO(WORDS).form.others == 0
