import torch

from tests import tiny


def test_repeating_puts_one_whole_copy_after_the_other_in_every_field():
    batch = tiny.new_conditions(3)
    twice = batch.repeat(2)
    assert twice.batch_size == 6
    assert twice.prompts == batch.prompts + batch.prompts
    for repeated, original in zip(twice[1:], batch[1:], strict=True):
        if original is None:
            assert repeated is None
        else:
            assert torch.equal(repeated, torch.cat([original, original]))


def test_taking_rows_of_a_repeated_batch_gives_the_same_rows_of_every_field():
    batch = tiny.new_conditions(3)._replace(negative_prompts=["a", None, "c"], seeds=[1, 2, 3], size=(16, 32))
    taken = batch.repeat(2).take(slice(3, 5))
    assert taken.prompts == batch.prompts[:2]
    assert torch.equal(taken.prompt_embeds, batch.prompt_embeds[:2])
    assert torch.equal(taken.indices, batch.indices[:2])
    assert (taken.negative_prompts, taken.seeds, taken.size, taken.x0) == (["a", None], [1, 2], (16, 32), None)
