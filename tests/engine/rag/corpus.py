"""Documents with facts for the tests of the RAG SDK, and engines to read them with."""

from pathlib import Path
from pydoc_data.topics import topics

import torch

from engine import Engine, EngineConfig
from engine.demo.haystack import Fact
from engine.model.loader import load_module, load_tokenizer
from kvstore.config import StoreConfig

MODELS = Path(__file__).parents[3] / "models"
FACTS = tuple(
    Fact(key, value)
    for key, value in {
        "tiger": "314159", "ruby": "271828", "Paris": "141421", "violin": "173205",
    }.items()
)  # fmt: skip
PAGES = ("assert", "del", "pass", "global")  # short ones


def documents() -> list[dict[str, str]]:
    """One a fact: a page of the Python reference, with the fact in its middle."""
    return [
        {"id": page, "title": f"On {page}", "text": hidden(topics[page][:700], fact)}
        for page, fact in zip(PAGES, FACTS, strict=True)
    ]


def hidden(text: str, fact: Fact) -> str:
    at = text.index(". ", len(text) // 3) + 1
    return text[:at] + fact.statement + text[at:]


class Parts:
    """The little model, loaded once; engines of it in a store of their own."""

    def __init__(self) -> None:
        folder = MODELS / "needle-tiny"
        self.module = load_module(folder, dtype=None, device=torch.device("cpu"))
        self.tokenizer = load_tokenizer(folder)

    def engine(self, path: Path | None = None, *, host: int = 1 << 28, **settings) -> Engine:
        store = StoreConfig(host_bytes=host, disk_path=None if path is None else str(path))
        return Engine(self.module, self.tokenizer, EngineConfig(store=store, **settings))


def blocks(engine: Engine) -> set[int]:
    """How many blocks the tiers hold."""
    engine.store.flush()
    return {tier.blocks for tier in engine.stats().tiers.values()}
