"""Events of a request without a model: its tokens are given, all else is the engine's own."""

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.request import Chosen, Request, Running
from engine.sampling import Likely, TokenLogprob

MODELS = Path(__file__).parents[3] / "models"


@cache
def of_bytes():
    """A token for each byte but one for "th", so that most characters are split."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*letters, "th", "<end>"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@cache
def of_pieces():
    """Pieces with marked spaces, and bytes for what they lack, as SentencePiece makes them."""
    pieces = ["<unk>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thelo.", "th", "▁t"]
    made = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[("▁", "t"), ("t", "h")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>")


@cache
def of_words():
    """Words, and parts that continue them."""
    pieces = ["[UNK]", "[END]", "he", "##llo", "the", "##re", "a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[END]", unk_token="[UNK]")


@cache
def of_model(name):
    """That of a model that comes along."""
    return AutoTokenizer.from_pretrained(MODELS / name)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def told(tokenizer, tokens, *, stop=(), end="length", top=None, prompt=(1, 2, 3)):
    """All events of an answer of these tokens; what a stop string cuts off does not come.

    Args:
        top: pairs of token and logprob that come with each token; None for no logprobs.
    """
    request = Request(tuple(prompt), len(tokens) + 1, stop=tuple(stop))
    run = Running(request, eos=frozenset(), limit=len(tokens) + 1, tokenizer=tokenizer)
    events = []
    for number, token in enumerate(tokens, start=1):
        scored = None
        if top is not None:
            scored = TokenLogprob(token, -0.25 * number, tuple(Likely(*pair) for pair in top))
        ending = end if number == len(tokens) else None
        events.append(run.tell(Chosen(token, ending, scored)))
        if run.finish_reason is not None:
            break
    return events
