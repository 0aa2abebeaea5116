import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srpo_lightning.draws import Draws, Shares, keyed_generator, permutation, sample_noise

KEY = st.tuples(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(0, 64))


@given(KEY)
def test_the_same_key_draws_the_same_numbers_whatever_was_drawn_before(key):
    first = Draws(*key).noise((2, 3), shared=False)
    torch.manual_seed(0)
    torch.randn(7)
    assert torch.equal(Draws(*key).noise((2, 3), shared=False), first)


@given(KEY, st.sampled_from(["seed", "step", "rank"]))
def test_changing_any_part_of_the_key_changes_what_is_drawn(key, part):
    draws = Draws(*key)
    other = draws._replace(**{part: getattr(draws, part) + 1})
    assert not torch.equal(draws.noise((4,), shared=False), other.noise((4,), shared=False))


def test_purposes_draw_independent_numbers():
    a, b = (torch.randn(4, generator=keyed_generator(0, 0, 0, purpose)) for purpose in ("noise", "position"))
    assert not torch.equal(a, b)


def test_neighbouring_numbers_of_a_key_are_not_run_together():
    """(1, 23) and (12, 3) read the same without a separator."""
    assert keyed_generator(1, 23).initial_seed() != keyed_generator(12, 3).initial_seed()


@pytest.mark.parametrize("rank", [1, 7])
def test_shared_noise_is_equal_on_every_rank_and_own_noise_is_not(rank):
    zero, other = Draws(3, 5, 0), Draws(3, 5, rank)
    assert torch.equal(zero.noise((2, 3), shared=True), other.noise((2, 3), shared=True))
    assert not torch.equal(zero.noise((2, 3), shared=False), other.noise((2, 3), shared=False))


DRAWS = {
    "noise": lambda draws, count: draws.noise((count, 3), shared=False),
    "integers": lambda draws, count: draws.integers("position", 0, 9**9, count, shared=False),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_one_rank_draws_for_its_batch_what_several_draw_for_theirs(draw):
    together = draw(Draws(3, 5, 0), 4)
    assert torch.equal(torch.cat([draw(Draws(3, 5, rank), 1) for rank in range(4)]), together)
    assert torch.equal(torch.cat([draw(Draws(3, 5, rank), 2) for rank in range(2)]), together)
    assert len(together.unique(dim=0)) == 4


def test_shared_numbers_are_the_same_for_every_sample():
    noise, position = Draws(3).noise((3, 2), shared=True), Draws(3).integers("position", 0, 9**9, 3, shared=True)
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise, Draws(3, rank=2).noise((3, 2), shared=True))
    assert len(position.unique()) == 1
    assert not torch.equal(noise[0, 0], noise[0, 1])


def test_integers_cover_both_ends():
    drawn = Draws(0).integers("position", 5, 8, 400, shared=False)
    assert drawn.dtype == torch.int64
    assert drawn.unique().tolist() == [5, 6, 7, 8]


def test_noise_is_float32_under_another_default_dtype():
    """Lightning's bf16-true makes bfloat16 the default: the numbers of a run must not depend on it."""
    expected, sample = Draws(1).noise((4,), shared=True), sample_noise(1, [2], (4,))
    torch.set_default_dtype(torch.bfloat16)
    try:
        noise, again = Draws(1).noise((4,), shared=True), sample_noise(1, [2], (4,))
    finally:
        torch.set_default_dtype(torch.float32)
    assert noise.dtype == again.dtype == torch.float32
    assert torch.equal(noise, expected)
    assert torch.equal(again, sample)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=5))
def test_the_noise_of_a_sample_does_not_depend_on_its_batch(indices):
    batch = sample_noise(7, indices, (2, 3))
    assert batch.dtype == torch.float32
    for row, index in enumerate(indices):
        assert torch.equal(batch[row], sample_noise(7, [index], (2, 3))[0])


def test_a_sample_with_a_seed_of_its_own_depends_on_that_alone():
    a, b, c = sample_noise(7, [0, 1, 2], (4,), [None, 5, 5])
    assert torch.equal(b, c)
    assert torch.equal(b, sample_noise(8, [9], (4,), [5])[0])
    assert torch.equal(a, sample_noise(7, [0], (4,))[0])
    assert not torch.equal(b, sample_noise(7, [5], (4,))[0])


def test_different_samples_and_seeds_have_different_noise():
    a, b = sample_noise(7, [0, 1], (4,))
    assert not torch.equal(a, b)
    assert not torch.equal(a, sample_noise(8, [0], (4,))[0])


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 50))
def test_a_pass_visits_every_prompt_once(seed, epoch, size):
    order = permutation(seed, epoch, size)
    assert sorted(order.tolist()) == list(range(size))


def test_passes_have_different_orders():
    assert not torch.equal(permutation(0, 0, 50), permutation(0, 1, 50))
    assert not torch.equal(permutation(0, 0, 50), permutation(1, 0, 50))


@given(st.lists(st.sampled_from([1.0, 2.0, 0.5, 3.0]), min_size=1, max_size=4), st.integers(0, 300), st.integers(0, 9))
def test_a_choice_knows_how_often_it_was_made_before(weights, n, seed):
    shares = Shares(weights, seed, "test")
    choices = [Shares(weights, seed, "test").at(turn)[0] for turn in range(n + 1)]
    assert shares.at(n) == (choices[-1], choices[:-1].count(choices[-1]))
    assert [shares.before(n, choice) for choice in range(len(weights))] == [
        choices[:-1].count(choice) for choice in range(len(weights))
    ]


def test_shares_come_out_exactly_over_each_period_in_another_order():
    shares = Shares([1, 3], 0, "test")
    assert shares.counts == [1, 3]
    turns = [[shares.at(turn)[0] for turn in range(start, start + 4)] for start in range(0, 80, 4)]
    assert all(sorted(period) == [0, 1, 1, 1] for period in turns)
    assert len(set(map(tuple, turns))) > 1


def test_odd_shares_come_out_to_a_thousandth_and_none_is_never_chosen():
    many, few = Shares([3**0.5, 1], 0, "test").counts
    assert many / (many + few) == pytest.approx(3**0.5 / (1 + 3**0.5), abs=1e-3)
    assert Shares([2**0.5, 1e-9], 0, "test").counts == [100_000, 1]


def test_many_rare_choices_are_no_more_frequent_than_they_should_be():
    counts = Shares([99_500, *[1] * 500], 0, "test").counts
    assert sum(counts[1:]) / sum(counts) == pytest.approx(0.005, rel=0.01)
