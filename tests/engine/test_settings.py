"""What is set or asked for wrongly from code is told by its name, before anything is done."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine import BlendConfig, ConfigError, Engine, EngineConfig, ModelError, PromptError
from engine.method import Method, preset
from engine.model.loader import locate
from engine.service.schedule import ScheduleConfig
from kvstore.errors import PoolFull
from tests.engine.families import build

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Method(index="headrace"), r"method\.index is one of dense, exact.*'headrace'"),
        (lambda: Method(index="exact", keys="fp8"), r"method\.keys is one of exact.*lowrank"),
        (lambda: Method(index="exact", reduce="mean"), r"method\.reduce is one of max, sum"),
        (lambda: Method(index="exact", attend_on="gpu"), r"method\.attend_on is one of auto"),
        (lambda: Method(index="exact", prefetch="layers"), r"method\.prefetch is one of none"),
        (lambda: BlendConfig(policy="Union"), r"blend\.policy is one of reposition.*'Union'"),
        (lambda: ScheduleConfig(policy="FCFS"), r"schedule\.policy is one of fcfs, fair"),
        (lambda: EngineConfig(spill_path=""), "spill_path must name a folder"),
        (lambda: EngineConfig(spill_path="a\0b"), "spill_path must name a folder"),
    ],
)
def test_a_name_that_is_none_is_refused_with_those_there_are(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_a_spill_no_larger_than_memory_names_both_settings(tmp_path):
    config = EngineConfig(
        method=preset("headrace"), pinned_bytes=64 << 20, spill_path=str(tmp_path),
        spill_bytes=32 << 20,
    )  # fmt: skip
    with pytest.raises(PoolFull, match=r"spill_bytes 33554432 holds .*lower pinned_bytes"):
        Engine(build("llama"), None, config)


def test_a_model_without_a_name_is_no_folder_of_models():
    with pytest.raises(ModelError, match="the adapter has no name"):
        locate("", "adapter")


def test_a_conversation_is_texts():
    empty = pytest.raises(PromptError, match="the conversation is empty")
    with Engine.from_pretrained("needle-tiny") as engine, empty:
        engine.render([])


WRONG = """
import numpy as np
from engine import Engine, PromptError

def said(**asked):
    try:
        return engine.generate([5, 6], **dict(dict(max_new_tokens=2), **asked))[0].tokens
    except PromptError as error:
        return str(error)

with Engine.from_pretrained("needle-tiny") as engine:
    assert len(said(max_new_tokens=np.int64(2))) <= 2
    assert len(said(seed=np.int32(3), temperature=np.float32(0.5), top_k=np.int8(4))) <= 2
    for name, value in dict(
        max_new_tokens=2.5, top_k=2.5, seed=1.5, temperature=None, top_p="1"
    ).items():
        assert f"{name} must be a" in said(**{name: value}), (name, said(**{name: value}))
    assert "a stop string is text" in said(stop=[5])
    assert "a stop string is text" in said(stop=b"ab")
    try:
        engine.render([{"role": "user", "content": [{"type": "text", "text": "a"}]}])
    except PromptError as error:
        assert "content must be text, got list" in str(error)
    else:
        raise AssertionError("a list of parts was rendered")
"""


def test_numbers_of_any_type_are_taken_and_what_is_none_is_told():
    """In a process whose annotations are not enforced, as a user's are not."""
    done = subprocess.run(
        [sys.executable, "-c", WRONG], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
