"""The bench of codecs in small: what it must find whatever machine it runs on."""

import importlib
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.method import Method
from evals.needles import Needles, ask

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module("bench_codecs")


@pytest.fixture(scope="module")
def rows(bench):
    """Of KV of the reference model over real text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "RECORDS_BYTES", 1)
        patch.setattr(bench, "ROUNDS", 1)
        with Engine.from_pretrained(ROOT / "models" / "reference", device="cpu") as engine:
            tokens = engine.tokenize(bench.pages())[: 256 + bench.TAIL]
            reading = bench.Reading(engine, tokens)
        return {name: reading.row(codec, 2) for name, codec in bench.CODECS.items()}


def test_what_is_lossless_changes_nothing(rows):
    for name in ("raw", "lossless"):
        row = rows[name]
        assert row.key_error == row.value_error == row.output_error == row.kl == 0
    assert rows["raw"].ratio == 1 < 1.4 < rows["lossless"].ratio


def test_int8_is_half_a_percent_off_and_smoothed_int4_less_than_plain(rows):
    assert rows["int8"].output_error <= 0.005
    smoothed, plain = rows["int4"], rows["int4 plain"]
    assert smoothed.bytes_per_token == plain.bytes_per_token
    for error in ("key_error", "value_error", "output_error", "kl"):
        assert getattr(smoothed, error) < getattr(plain, error), error


def test_bytes_of_a_token_are_what_the_formats_say(rows):
    numbers = 8 * 2 * 2 * 64  # layers, K and V, KV heads, dimensions
    channels = numbers * 4 / 64  # a middle and a step for 64 tokens
    eight, four = numbers + channels, numbers / 2 + numbers / 16 + channels
    sizes = {name: row.bytes_per_token for name, row in rows.items() if name != "lossless"}
    assert sizes == {
        "raw": 2 * numbers, "fp8": numbers + 8 * 2 * 2 * 4 / 64, "int8": eight,
        "k8v4": (eight + four) / 2, "int4": four, "int4 plain": four,
    }  # fmt: skip


def test_needles_are_asked_about_in_what_a_codec_leaves(bench):
    with Engine.from_pretrained(ROOT / "models" / "needle-tiny", device="cpu") as engine:
        asked = Needles.build(engine, tokens=512, needles=4, seed=0)
        text = bench.Stored(engine.model, asked.context)
        before = ask(engine, text, asked.questions, Method()).right
        text.put([bench.through(bench.CODECS["lossless"], block) for block in text.blocks])
        assert ask(engine, text, asked.questions, Method()).right == before
        assert any(before)
        text.put([torch.zeros_like(block) for block in text.blocks])
        assert not any(ask(engine, text, asked.questions, Method()).right)
