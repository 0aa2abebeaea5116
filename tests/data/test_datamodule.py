import functools
import itertools
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srpo_lightning.data import PromptData
from srpo_lightning.data.datamodule import SliceSampler, StepSampler

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(0, 100))


def batches(sampler: StepSampler, count: int) -> list[list[int]]:
    return list(itertools.islice(sampler, count))


@given(SIZES, st.integers(1, 3))
def test_each_pass_over_the_stream_is_a_permutation(sizes, num_passes):
    size, batch_size, seed = sizes
    stream = functools.reduce(operator.iadd, batches(StepSampler(size, batch_size, seed, 0, 1), num_passes * size), [])
    for start in range(0, num_passes * size, size):
        assert sorted(stream[start : start + size]) == list(range(size))


@given(SIZES, st.integers(0, 30))
def test_starting_anywhere_gives_the_tail_of_the_stream_from_zero(sizes, start):
    size, batch_size, seed = sizes
    whole = batches(StepSampler(size, batch_size, seed, 0, 1), start + 5)
    assert batches(StepSampler(size, batch_size, seed, 0, 1, start), 5) == whole[start:]


@given(SIZES, st.integers(1, 4), st.integers(0, 10))
def test_the_ranks_together_are_one_rank_with_the_global_batch(sizes, world_size, start):
    size, batch_size, seed = sizes
    ranks = [batches(StepSampler(size, batch_size, seed, r, world_size, start), 4) for r in range(world_size)]
    together = [functools.reduce(operator.iadd, (rank[step] for rank in ranks), []) for step in range(4)]
    assert together == batches(StepSampler(size, batch_size * world_size, seed, 0, 1, start), 4)


def test_passes_and_seeds_are_ordered_differently():
    first, second = batches(StepSampler(20, 20, 0, 0, 1), 2)
    assert first != second
    assert first != batches(StepSampler(20, 20, 1, 0, 1), 1)[0]


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 4))
def test_the_ranks_together_evaluate_every_prompt_and_each_equally_many(size, batch_size, world_size):
    samplers = [SliceSampler(size, batch_size, rank, world_size) for rank in range(world_size)]
    seen = [functools.reduce(operator.iadd, sampler, []) for sampler in samplers]
    assert set(functools.reduce(operator.iadd, seen, [])) == set(range(size))
    assert len({len(indices) for indices in seen}) == 1
    assert sum(map(len, seen)) < size + world_size
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)


@pytest.fixture
def data(models, features):
    data = PromptData(
        str(models.train), str(models.evaluation), str(models.pipeline), batch_size=2, cache_dir=str(features), seed=1
    )
    data.prepare_data()
    return data


def test_a_batch_holds_the_cached_features_of_its_prompts(data):
    batch = next(iter(data.train_dataloader()))
    assert batch.prompts == [data.train_prompts[i] for i in batch.indices]
    for row, prompt in enumerate(batch.prompts):
        assert torch.equal(batch.prompt_embeds[row], data.cache[prompt].prompt_embeds)
        assert torch.equal(batch.pooled_prompt_embeds[row], data.cache[prompt].pooled_prompt_embeds)


def test_a_restored_data_module_goes_on_where_the_saved_one_stood(data):
    whole = [batch.prompts for batch in itertools.islice(data.train_dataloader(), 5)]
    data.load_state_dict({"num_batches": 3})
    assert [batch.prompts for batch in itertools.islice(data.train_dataloader(), 2)] == whole[3:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(data, num_workers):
    expected = [batch.indices.tolist() for batch in itertools.islice(data.train_dataloader(), 3)]
    data.num_workers = num_workers
    assert [batch.indices.tolist() for batch in itertools.islice(data.train_dataloader(), 3)] == expected


def test_evaluation_takes_the_first_prompts_in_the_order_of_the_file(models, features):
    data = PromptData(
        str(models.train), str(models.evaluation), str(models.pipeline), num_eval_prompts=2, cache_dir=str(features)
    )
    data.prepare_data()
    assert [batch.prompts for batch in data.val_dataloader()] == [["c0", "c1"]]


def test_several_samples_of_a_prompt_have_numbers_of_their_own(models, features):
    """The number seeds the noise: no two samples of an evaluation share theirs."""
    data = PromptData(
        str(models.train), str(models.evaluation), str(models.pipeline), eval_samples_per_prompt=3,
        cache_dir=str(features),
    )  # fmt: skip
    data.prepare_data()
    prompts = functools.reduce(operator.iadd, (batch.prompts for batch in data.val_dataloader()), [])
    numbers = functools.reduce(operator.iadd, (batch.indices.tolist() for batch in data.val_dataloader()), [])
    assert sorted(numbers) == list(range(9))
    assert sorted(prompts) == sorted(["c0", "c1", "c2"] * 3)


def test_empty_lines_and_cut_prompts_are_reported(models, features, tmp_path, caplog):
    train = tmp_path / "train.txt"
    train.write_text("a\n\n" + "b" * 40 + "\n")
    data = PromptData(str(train), str(models.evaluation), str(models.pipeline), cache_dir=str(features))
    with caplog.at_level("INFO"):
        data.prepare_data()
    assert "prompts: 2 to train, 3 to evaluate" in caplog.text
    assert "1 empty lines skipped" in caplog.text
    assert f"prompts: 1 cut to the {data.cache.encoder.max_sequence_length} tokens" in caplog.text
    assert "'" + "b" * 40 + "'" in caplog.text
