import pytest

from tools.emoji.tokenizers import MAX_TOKENS, new_clip_tokenizer, new_t5_tokenizer, words_of

CAPTIONS = ["3d. red apple", "ink. red apple", "cat", "ink"]


def test_words_are_without_punctuation():
    assert words_of(CAPTIONS) == ["3d", "apple", "cat", "ink", "red"]


@pytest.mark.parametrize("text", ["3d. red apple", "cat", "ink. cat"])
def test_t5_spells_captions_in_whole_words_and_back(text: str):
    tokenizer = new_t5_tokenizer(CAPTIONS)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) == len(text.split()) + text.count(".") + 1


@pytest.mark.parametrize("text", ["Real. zebra-striped", "photo, 24 mm?"])
def test_unknown_words_fall_apart_into_known_letters(text: str):
    t5 = new_t5_tokenizer(CAPTIONS)
    assert t5.decode(t5(text).input_ids, skip_special_tokens=True) == text
    clip = new_clip_tokenizer(CAPTIONS)
    # Apart from the two that frame the text, no token is the one that stands for the unknown.
    assert clip.unk_token_id not in clip(text).input_ids[1:-1]
    assert clip.decode(clip(text).input_ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")


def test_clip_reads_a_known_word_as_one_token():
    clip = new_clip_tokenizer(CAPTIONS)
    assert clip.convert_ids_to_tokens(clip("red apple").input_ids[1:-1]) == ["red</w>", "apple</w>"]


def test_long_prompts_end_with_the_end_token():
    for tokenizer in (new_clip_tokenizer(CAPTIONS), new_t5_tokenizer(CAPTIONS)):
        ids = tokenizer("red " * 40, truncation=True).input_ids
        assert len(ids) == MAX_TOKENS
        assert ids[-1] == tokenizer.eos_token_id
