import torch

from tests import tiny


def test_repeating_puts_one_whole_copy_after_the_other_in_every_field():
    batch = tiny.new_conditions(3)
    twice = batch.repeat(2)
    assert twice.batch_size == 6
    assert twice.prompts == batch.prompts + batch.prompts
    for repeated, original in zip(twice[1:], batch[1:], strict=True):
        assert torch.equal(repeated, torch.cat([original, original]))
