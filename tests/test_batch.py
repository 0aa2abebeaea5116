import torch

from srpo_lightning.batch import Text
from tests import tiny


def test_repeating_puts_one_whole_copy_after_the_other_in_every_field():
    batch = tiny.new_conditions(3)._replace(
        size=(32, 16),
        x0=torch.randn(3, 2, 4),
        seeds=[1, None, 3],
        negative_prompts=[None, "b", None],
        tags=[["x"], [], ["y", "z"]],
        unconditional=Text({"rows": torch.randn(3, 5, 2)}),
    )
    twice = batch.repeat(2)
    assert twice.batch_size == 6
    assert twice.size == batch.size
    for name in (name for name in batch._fields if name != "size"):
        repeated, original = getattr(twice, name), getattr(batch, name)
        if isinstance(original, Text):
            for key, tensor in original.tensors.items():
                assert torch.equal(repeated.tensors[key], torch.cat([tensor, tensor])), key
        elif isinstance(original, torch.Tensor):
            assert torch.equal(repeated, torch.cat([original, original])), name
        else:
            assert repeated == original + original, name


def test_what_a_batch_does_not_have_is_not_repeated():
    assert tiny.new_conditions(3).repeat(2)[3:] == (None,) * 6


def test_taking_rows_of_a_repeated_batch_gives_the_same_rows_of_every_field():
    batch = tiny.new_conditions(3)._replace(negative_prompts=["a", None, "c"], seeds=[1, 2, 3], size=(16, 32))
    taken = batch.repeat(2).take(slice(3, 5))
    assert taken.prompts == batch.prompts[:2]
    assert torch.equal(taken.text.tensors["prompt_embeds"], batch.text.tensors["prompt_embeds"][:2])
    assert torch.equal(taken.indices, batch.indices[:2])
    assert (taken.negative_prompts, taken.seeds, taken.size, taken.x0) == (["a", None], [1, 2], (16, 32), None)


def test_the_text_that_guidance_moves_away_from_stays_one_row_for_all_prompts():
    batch = tiny.new_conditions(3)._replace(unconditional=Text({"rows": torch.randn(1, 5, 2)}, torch.tensor([4])))
    assert batch.repeat(2).unconditional is batch.take(slice(0, 2)).unconditional is batch.unconditional
    expanded = batch.unconditional.expand(6)
    assert expanded.tensors["rows"].shape == (6, 5, 2)
    assert expanded.lengths.tolist() == [4] * 6


def test_sequences_of_each_prompts_own_length_are_padded_with_zeros_and_have_a_mask():
    items = [{"rows": torch.ones(n, 2, 3), "whole": torch.full((4,), n)} for n in (3, 1)]
    text = Text.collate(items, ragged={"rows"})
    assert text.tensors["rows"].shape == (2, 3, 2, 3)
    assert text.lengths.tolist() == [3, 1]
    assert text.tensors["rows"][1, 1:].eq(0).all()
    assert text.mask("rows").tolist() == [[True, True, True], [True, False, False]]
    assert all(torch.equal(own, item["rows"]) for own, item in zip(text.rows("rows"), items, strict=True))
    assert torch.equal(text.tensors["whole"], torch.stack([item["whole"] for item in items]))
    whole = Text.collate(items[:1])
    assert whole.mask("rows") is None
    assert torch.equal(whole.rows("rows")[0], items[0]["rows"])
