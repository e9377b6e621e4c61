"""Bytes of single tokens: those of an answer are its text, whatever the vocabulary."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.serve.token_text import TokenText, longest
from tests.engine.serve.told import ids, of_bytes, of_model, of_pieces, of_words, told

TOKENIZERS = {
    "bytes": of_bytes,
    "pieces": of_pieces,
    "needle": lambda: of_model("needle-tiny"),
    "reference": lambda: of_model("reference"),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def data(tokenizer, tokens):
    words = TokenText(tokenizer)
    return b"".join((words.data if n else words.opening)(token) for n, token in enumerate(tokens))


TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(" thelo.€😀"), max_size=20
)


@given(text=TEXT)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bytes_of_an_answer_are_its_text(name, text):
    tokenizer = TOKENIZERS[name]()
    tokens = ids(tokenizer, text)
    assume(not set(tokens) & set(tokenizer.all_special_ids))  # written out, one is no text
    streamed = "".join(event.text for event in told(tokenizer, tokens))
    assert data(tokenizer, tokens).decode() == streamed
    if name in ("bytes", "reference"):
        assert streamed == text


def test_a_character_is_spread_over_its_tokens():
    tokenizer = of_bytes()
    words = TokenText(tokenizer)
    assert [words.data(token) for token in ids(tokenizer, "th€")] == [
        b"th", b"\xe2", b"\x82", b"\xac",
    ]  # fmt: skip


def test_bytes_to_fall_back_on_are_bytes():
    tokenizer = of_pieces()
    words = TokenText(tokenizer)
    tokens = ids(tokenizer, "th ä")
    pieces = tokenizer.convert_ids_to_tokens(tokens)
    assert pieces == ["▁t", "h", "▁", "<0xC3>", "<0xA4>"]
    assert [words.data(token) for token in tokens] == [b" t", b"h", b" ", b"\xc3", b"\xa4"]
    assert words.opening(tokens[0]) == b"t"  # as the decoder has it


def test_a_space_at_the_start_stays_where_the_decoder_keeps_it():
    tokenizer = of_bytes()
    assert TokenText(tokenizer).opening(ids(tokenizer, " a")[0]) == b" "


def test_words_have_the_space_in_front_of_them():
    tokenizer = of_words()
    words = TokenText(tokenizer)
    tokens = ids(tokenizer, "hello there")
    assert [words.data(token) for token in tokens] == [b" he", b"llo", b" the", b"re"]
    assert data(tokenizer, tokens) == b"hello there"


def test_a_piece_that_looks_like_a_byte_is_text_where_it_is_none():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<0xE4>": 0, "a": 1}, unk_token="a"))
    made.decoder = decoders.Fuse()
    assert TokenText(PreTrainedTokenizerFast(tokenizer_object=made)).data(0) == b"<0xE4>"


def test_added_tokens_are_what_they_are_called():
    tokenizer = of_model("needle-tiny")
    words = TokenText(tokenizer)
    (ruby,) = ids(tokenizer, " ruby")
    assert words.data(ruby) == b" ruby"
    assert not words.special(ruby)
    end = tokenizer.eos_token_id
    assert words.special(end)
    assert words.data(end) == tokenizer.eos_token.encode()


def test_a_token_that_the_vocabulary_lacks_has_no_bytes(tokenizer):
    words = TokenText(tokenizer)
    assert words.data(len(tokenizer) + 1000) == b""
    assert not words.special(len(tokenizer) + 1000)


def test_every_token_of_a_vocabulary_has_its_bytes():
    for name in ("needle-tiny", "reference"):
        tokenizer = of_model(name)
        words = TokenText(tokenizer)
        for token in range(0, len(tokenizer), 7):
            text = tokenizer.decode([token], skip_special_tokens=False)
            assert words.data(token).decode(errors="replace") == text


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT)
def test_no_token_stands_for_more_bytes_than_the_longest(name, text):
    tokenizer = TOKENIZERS[name]()
    most = longest(tokenizer)
    assert most is not None
    assert len(text.encode()) <= len(ids(tokenizer, text)) * most


def test_the_longest_token_is_known_where_all_bytes_are():
    assert longest(of_bytes()) == len("<end>")
    assert longest(of_model("needle-tiny")) == 10
    assert longest(of_words()) is None  # one token for any word it does not know
