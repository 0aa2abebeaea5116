"""A reward whose tokens end before the control words."""

import pytest

from srpo_lightning.data import PromptData
from srpo_lightning.objectives import SRPO, ControlWords, Plain, Relative
from srpo_lightning.objectives.readings import check_readings
from srpo_lightning.rewards import ClipReward, Term, WeightedReward
from tests import tiny

SHORT, LONG = "a cat", "a cat on a mat in a house"
WORDS = ControlWords(["ab", "cd"], ["ef"])


@pytest.fixture
def reward(models):
    own = ClipReward(str(models.clip))
    own.load()
    return own


def relative(template: str = "{word}. {prompt}", words: ControlWords = WORDS) -> Relative:
    return Relative(words, template=template)


def test_words_behind_a_prompt_that_fills_the_reward_are_refused_with_the_prompt(reward):
    check_readings(relative("{prompt} {word}"), reward, [SHORT] * 9)
    cure = (
        rf"ClipReward reads no difference .* in its {tiny.MAX_TOKENS} tokens.*'{LONG}' of 25 letters: put .word. first"
    )
    with pytest.raises(ValueError, match=cure):
        check_readings(relative("{prompt} {word}"), reward, [SHORT, LONG])


def test_the_limit_of_the_reward_is_said_where_it_cuts(reward):
    (line,) = check_readings(relative(), reward, [SHORT[:1], LONG])
    assert (
        line
        == f"prompts: 1 of 2 looked at are cut to the {tiny.MAX_TOKENS} tokens that ClipReward reads, first: '{LONG}'"
    )
    assert check_readings(Plain(), reward, [SHORT, LONG]) == [line]
    assert check_readings(Plain(), reward, [SHORT]) == []


def test_words_that_the_reward_spells_alike_are_refused(reward):
    with pytest.raises(
        ValueError, match=r"reads no difference between control words, so that nothing would be trained"
    ):
        check_readings(relative(words=ControlWords(["\u4e00"], ["\u4e8c"])), reward, ["c"])


def test_every_term_that_the_words_steer_is_looked_at(reward):
    plain = WeightedReward([Term(reward, plain=True), Term(reward)])
    assert [is_steered for _, is_steered in plain.readers()] == [False, True]
    with pytest.raises(ValueError, match=r"reads no difference"):
        check_readings(relative("{prompt} {word}"), plain, [LONG])
    alone = WeightedReward([Term(reward, plain=True)])
    assert len(check_readings(relative("{prompt} {word}"), alone, [LONG])) == 1


def test_a_run_is_refused_before_its_first_step(models, features, tmp_path):
    (tmp_path / "p.txt").write_text(f"{LONG}\n")
    data = PromptData(str(tmp_path / "p.txt"), tiny.encoder_of(models), str(models.evaluation), cache_dir=str(features))
    module = tiny.new_module(models)
    module.objective = SRPO(WORDS, template="{prompt} {word}", num_rollout_steps=2)
    with pytest.raises(ValueError, match=r"reads no difference .*a cat on a mat"):
        tiny.new_trainer(tmp_path).fit(module, data)
