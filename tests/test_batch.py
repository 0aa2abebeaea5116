import torch

from tests import tiny


def test_repeating_puts_one_whole_copy_after_the_other_in_every_field():
    batch = tiny.new_conditions(3)._replace(
        size=(32, 16),
        x0=torch.randn(3, 2, 4),
        seeds=[1, None, 3],
        negative_prompts=[None, "b", None],
        tags=[["x"], [], ["y", "z"]],
    )
    twice = batch.repeat(2)
    assert twice.batch_size == 6
    assert twice.size == batch.size
    for name in (name for name in batch._fields if name != "size"):
        repeated, original = getattr(twice, name), getattr(batch, name)
        if isinstance(original, torch.Tensor):
            assert torch.equal(repeated, torch.cat([original, original])), name
        else:
            assert repeated == original + original, name


def test_what_a_batch_does_not_have_is_not_repeated():
    assert tiny.new_conditions(3).repeat(2)[4:] == (None,) * 5


def test_taking_rows_of_a_repeated_batch_gives_the_same_rows_of_every_field():
    batch = tiny.new_conditions(3)._replace(negative_prompts=["a", None, "c"], seeds=[1, 2, 3], size=(16, 32))
    taken = batch.repeat(2).take(slice(3, 5))
    assert taken.prompts == batch.prompts[:2]
    assert torch.equal(taken.prompt_embeds, batch.prompt_embeds[:2])
    assert torch.equal(taken.indices, batch.indices[:2])
    assert (taken.negative_prompts, taken.seeds, taken.size, taken.x0) == (["a", None], [1, 2], (16, 32), None)
