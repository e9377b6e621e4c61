"""Streaming text: what is given out is never taken back, and adds up to the whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from engine.text import TextStream


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, so that every character of more than one byte is split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tok = Tokenizer(model)
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<end>")


def stream(tokenizer, text, stop=()):
    out = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(out.push(token))
        if out.stopped:
            break
    return pieces, out.finish(), out.stopped


@given(text=st.text(max_size=30), stop=st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_add_up_to_the_text_before_the_first_stop(tokenizer, text, stop):
    pieces, rest, stopped = stream(tokenizer, text, stop)
    got = "".join(pieces) + rest
    ends = [text.index(s) for s in stop if s in text]
    assert stopped == bool(ends)
    if not ends:
        assert got == text
    else:
        assert text.startswith(got)
        assert not any(s in got for s in stop)


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    pieces, rest, _ = stream(tokenizer, "a€😀b")
    assert [p for p in pieces if p] == ["a", "€", "😀", "b"]
    assert rest == ""


def test_a_stop_string_over_token_borders_is_never_shown(tokenizer):
    pieces, rest, stopped = stream(tokenizer, "one STOP two", ["STOP"])
    assert stopped
    assert "".join(pieces) + rest == "one "
    pieces, rest, stopped = stream(tokenizer, "one STO", ["STOP"])
    assert not stopped
    assert ("".join(pieces), rest) == ("one ", "STO")


def test_special_tokens_have_no_text(tokenizer):
    out = TextStream(tokenizer)
    assert out.push(tokenizer.eos_token_id) == ""
    assert out.finish() == ""


def test_bytes_that_are_no_character_do_not_pile_up(tokenizer):
    out = TextStream(tokenizer)
    broken = tokenizer("€")["input_ids"][1]  # the middle of a character, again and again
    shown = "".join(out.push(broken) for _ in range(40)) + out.finish()
    assert set(shown) == {"\ufffd"}
    assert len(out._tokens) - out._context < 30


@given(text=st.text("a\ufffd€😀", max_size=30))
def test_characters_behind_many_that_stand_for_none_stay_what_they_are(tokenizer, text):
    pieces, rest, _ = stream(tokenizer, text)
    assert "".join(pieces) + rest == text


def test_an_unfinished_character_at_the_end_is_shown_as_such(tokenizer):
    out = TextStream(tokenizer)
    first = tokenizer("€")["input_ids"][0]
    assert out.push(first) == ""
    assert out.finish() == "\ufffd"


@pytest.mark.parametrize("special", [0, 1, 2])
def test_a_blank_behind_a_special_token_stays(special):
    """Of decoders that drop the blank that begins a text, as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581hello": 3, "\u2581world": 4, "!": 5}
    tok = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tok.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    for ids in ([3, special, 4, 5], [special, 3, 4, 5], [3, 4, special]):
        out = TextStream(made)
        text = "".join(map(out.push, ids)) + out.finish()
        assert text == made.decode(ids, skip_special_tokens=True)


def test_words_behind_bytes_that_are_no_characters_stay_whole():
    """Of decoders that take a run of bytes as a whole: one that is wrong spoils all, as Llama 2's.

    Without what was given up before, a run may be right again, and its text shorter.
    """
    from tokenizers import Tokenizer, decoders, models

    words = {"<unk>": 0} | {f"<0x{n:02X}>": 1 + n for n in range(256)} | {"hello": 257}
    tok = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>", byte_fallback=True))
    tok.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    out = TextStream(PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>"))
    ids = [1 + byte for byte in b"\xff\x80" + "€😀😀".encode()] + [257]
    assert ("".join(map(out.push, ids)) + out.finish()).endswith("\ufffdhello")
