"""Documents cut into chunks: nothing is lost, nothing too long, and cuts are where they belong."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from engine import PromptError
from engine.model.loader import load_tokenizer
from engine.splitter import BREAK, Splitter

MODEL = Path(__file__).parents[2] / "models" / "needle-tiny"
TOKENIZER = load_tokenizer(MODEL)
SPLITTER = Splitter(TOKENIZER)
PAGE = topics["assignment"]
WIDE = (PAGE, "水" * 300, "=" * 400, "a")


def bare(text: str) -> str:
    return "".join(text.split())


def texts(*args, **options) -> list[str]:
    return [piece.text for piece in SPLITTER.split(*args, **options)]


@pytest.mark.parametrize("limit", [16, 64, 512])
@pytest.mark.parametrize("title", ["", "On"])
def test_pieces_hold_the_whole_text_within_the_limit(limit, title):
    pieces = SPLITTER.split(PAGE, limit=limit, title=title)
    assert bare("".join(piece.text for piece in pieces)) == bare(PAGE)
    assert all(len(piece.tokens) <= limit for piece in pieces)
    assert all(piece.text == piece.text.strip() != "" for piece in pieces)


def test_pieces_are_not_much_shorter_than_they_may_be():
    pieces = SPLITTER.split(PAGE, limit=128)
    assert all(len(piece.tokens) >= 50 for piece in pieces[:-1])


@settings(max_examples=60)
@given(st.text(max_size=300), st.integers(16, 40))
@example(" A", 16)  # one token, that begins before the text does
def test_any_text_can_be_cut(text, limit):
    pieces = SPLITTER.split(text, limit=limit)
    assert bare("".join(piece.text for piece in pieces)) == bare(text)
    assert all(len(piece.tokens) <= limit for piece in pieces)


def test_a_pieces_tokens_are_its_title_and_its_text():
    [piece] = SPLITTER.split("  It rained.\n", limit=64, title=" Weather ")
    assert piece.text == "It rained."
    assert TOKENIZER.decode(piece.tokens) == f"Weather{BREAK}It rained."


@pytest.mark.parametrize(
    ("better", "worse"), [("\n\n", "\n"), ("\n", ". "), (". ", " "), ("。", " "), ("\n \n", "! ")]
)
def test_a_cut_prefers_paragraphs_to_lines_to_sentences_to_words(better, worse):
    first = " ".join("x" * 20) + better
    window = first + " ".join("y" * 6) + worse + "z z z"
    limit = len(SPLITTER.encode(window))
    assert texts(window + " z" * 40, limit=limit)[0] == first.strip()


def test_a_cut_that_would_leave_less_than_half_is_not_made():
    first = texts("x x x.\n\n" + " ".join("y" * 80), limit=40)[0]
    assert first.startswith("x x x.\n\ny y y")


def test_text_without_a_space_is_cut_between_characters():
    pieces = texts("水" * 300, limit=64)
    assert "".join(pieces) == "水" * 300
    assert len(pieces) > 3


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_an_empty_text_has_no_pieces(text):
    assert SPLITTER.split(text, limit=64) == []


def test_what_spells_a_special_token_is_text():
    [piece] = SPLITTER.split("before <|eos|> after", limit=64)
    assert not set(piece.tokens) & set(TOKENIZER.all_special_ids)
    assert TOKENIZER.decode(piece.tokens) == "before <|eos|> after"
    assert not set(SPLITTER.encode("<|bos|>")) & set(TOKENIZER.all_special_ids)


def test_a_title_that_takes_half_of_a_chunk_is_refused():
    with pytest.raises(PromptError, match=r"left beside the title 'a long title .*raise chunk_tok"):
        SPLITTER.split("text", limit=32, title="a long title " * 20)


def test_a_limit_below_one_character_is_refused():
    with pytest.raises(PromptError, match="alone takes more than 2 tokens: raise chunk_tokens"):
        SPLITTER.split("水水水", limit=2)


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(PromptError, match="not Unicode: surrogates not allowed at 4"):
        SPLITTER.split("bad \ud800", limit=64)


def test_a_tokenizer_without_places_is_refused():
    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            return TOKENIZER(text, **options)

    with pytest.raises(PromptError, match="use a fast one"):
        Splitter(Slow()).split("text", limit=64)


def test_a_long_document_is_cut_in_time_that_grows_with_its_length():
    pages = "".join(topics.values())
    assert len(pages) > 400_000
    assert len(texts(pages, limit=512)) > 300


def test_what_is_cut_at_the_same_time_changes_no_other_tokens():
    """Chats have special tokens, documents have none, in whatever order they are encoded."""
    tokenizer = load_tokenizer(MODEL)
    text = "some words <|bos|> more words. " * 20
    special, plain = list(tokenizer(text)["input_ids"]), SPLITTER.encode(text)
    assert special != plain
    splitter, seen = Splitter(tokenizer), []

    def chat(_: int) -> bool:
        seen.append(tokenizer.backend_tokenizer.encode_special_tokens)
        return list(tokenizer(text)["input_ids"]) == special

    def document(_: int) -> bool:
        return splitter.encode(text) == plain

    with ThreadPoolExecutor(4) as threads:
        ends = [threads.submit(act, i) for i in range(200) for act in (chat, document)]
        assert all(end.result() for end in ends)
    assert not any(seen)


def test_the_longest_token_bounds_how_much_text_a_token_can_be():
    assert all(len(text.encode()) <= SPLITTER.longest * len(SPLITTER.encode(text)) for text in WIDE)
    assert SPLITTER.longest < 200


@pytest.mark.parametrize("form", [normalizers.NFC(), normalizers.StripAccents()])
@pytest.mark.parametrize(
    "text", ["Cafe\u0301", "Cafe\u0301. " * 40, "\u0301", "a\u0301\u0302\n\n" * 20]
)
def test_what_a_tokenizer_drops_stays_with_what_is_before_it(form, text):
    tokenizer = load_tokenizer(MODEL)
    tokenizer.backend_tokenizer.normalizer = form
    pieces = Splitter(tokenizer).split(text, limit=16)
    if pieces:
        assert bare("".join(piece.text for piece in pieces)) == bare(text)
    assert all(not piece.text.startswith("\u0301") for piece in pieces[1:])
    assert bool(pieces) == bool(Splitter(tokenizer).encode(text))


@pytest.mark.parametrize(("text", "title"), [("\udce9", ""), ("It rained.", "caf\udce9")])
def test_what_is_not_unicode_is_refused(text, title):
    with pytest.raises(PromptError, match="is not Unicode"):
        SPLITTER.split(text, limit=64, title=title)
