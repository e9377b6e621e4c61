"""Trace files: chains as they were, and what is refused."""

import gzip
import json

import pytest

from engine.errors import ConfigError
from evals.traces import read
from evals.traces.read import read_traces, trace
from tests.data import real_data


def write(path, lines):
    data = "".join(json.dumps(x) + "\n" for x in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def chains(made):
    return [chain.tolist() for chain in made.chains]


def turn(s, i, t, n, p=-1, k=0):
    return {"s": s, "i": i, "t": t, "in": 512 * n, "out": 1, "n": n, "p": p, "k": k, "tool": 0}


def test_conversations_keep_their_blocks_and_their_order(tmp_path):
    lines = [{"timestamp": i, "hash_ids": x} for i, x in enumerate([[9, 4], [9, 7, 5], [9, 4, 6]])]
    (made,) = read_traces(write(tmp_path / "chat.jsonl", lines))
    assert made.name == "chat"
    assert chains(made) == [[4, 0], [4, 3, 1], [4, 0, 2]]
    assert (made.blocks, made.distinct, made.shared) == (8, 5, 1)


def test_an_empty_line_is_no_request(tmp_path):
    (tmp_path / "chat.jsonl").write_text('\n{"hash_ids": [1]}\n \n{"hash_ids": [1, 2]}\n\n')
    (made,) = read_traces(tmp_path)
    assert chains(made) == [[0], [0, 1]]


def test_sessions_are_rebuilt_from_what_they_share(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "USERS", 1)
    lines = [turn(1, 0, 0, 2), turn(1, 1, 5, 4, 0, 2), turn(1, 2, 9, 3, 0, 1), turn(2, 0, 0, 1)]
    (made,) = read_traces(write(tmp_path / "agent.jsonl.gz", lines))
    assert made.name == "agent"
    assert chains(made) == [[0, 1], [0, 1, 2, 3], [0, 4, 5], [6]]
    assert made.shared == 0


def test_users_begin_their_next_session_when_one_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "USERS", 2)
    sessions = [
        turn(1, 0, 0, 1),
        turn(1, 1, 10, 1),
        turn(2, 0, 0, 1),
        turn(2, 1, 4, 1),
        turn(3, 0, 0, 1),
    ]
    sessions[-1:] = [turn(3, 0, 1, 1), turn(3, 1, 7, 1)]  # begins at 4, when 2 ends
    (made,) = read_traces(write(tmp_path / "a.jsonl", sessions))
    assert chains(made) == [[0], [2], [3], [4], [1], [5]]


def test_a_limit_takes_the_first_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "USERS", 2)
    write(tmp_path / "a.jsonl", [turn(1, 0, 0, 1), turn(1, 1, 9, 1), turn(2, 0, 1, 1)])
    write(tmp_path / "b.jsonl", [{"hash_ids": [i]} for i in range(5)])
    one, other = read_traces(tmp_path, limit=2)
    assert chains(one) == [[0], [1]]
    assert chains(other) == [[0], [1]]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"no json\n",
        b"[1]\n",
        b"[" * 100_000,
        b"12\n",
        b'{"hash_ids": [1]}\n{"hash_ids": "x"}\n',
        b'{"hash_ids": [18446744073709551615]}\n',
        b'{"s": 1}\n',
    ],
)
def test_what_is_no_trace_is_refused_by_name(tmp_path, text):
    (tmp_path / "a.jsonl").write_bytes(text)
    with pytest.raises(ConfigError, match="a"):
        read_traces(tmp_path)


def test_damaged_archives_are_refused(tmp_path):
    whole = write(tmp_path / "a.jsonl.gz", [turn(1, 0, 0, 1)]).read_bytes()
    damages = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(10, 30)]
    for damaged in (b"plain", whole[:-12], *damages):
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        with pytest.raises(ConfigError, match="is no trace"):
            read_traces(tmp_path)


def test_a_session_that_refers_to_no_earlier_request_is_refused(tmp_path):
    for line in (turn(1, 0, 0, 2, p=3, k=1), turn(1, 0, 0, 2, k=1)):
        with pytest.raises(ConfigError, match="session 1"):
            read_traces(write(tmp_path / "a.jsonl", [line]))


def test_a_request_longer_than_any_prompt_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="request 0 of session 1 has 100,000,000,000,000 blocks"):
        read_traces(write(tmp_path / "a.jsonl", [turn(1, 0, 0, 10**14)]))


def test_a_folder_without_traces_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="no traces in"):
            read_traces(path)


def test_ids_must_stand_for_prefixes():
    with pytest.raises(ConfigError, match="block 5 follows different blocks"):
        trace("x", [[1, 5], [2, 5]])
    with pytest.raises(ConfigError, match="block 1 follows different blocks"):
        trace("x", [[1, 1]])
    for empty in ([], [[]], [[1], []]):
        with pytest.raises(ConfigError, match="at least one block"):
            trace("x", empty)


def test_recorded_conversations_are_read_whole():
    (made,) = read_traces(real_data("traces/mooncake_conversation.jsonl"))
    assert (len(made.chains), made.blocks, made.distinct) == (12_031, 288_500, 182_790)
    assert made.shared == 1


@pytest.mark.slow
def test_recorded_sessions_are_read_whole():
    (made,) = read_traces(real_data("traces/agentic_sessions_512tok.jsonl.gz"))
    assert (len(made.chains), made.blocks, made.distinct) == (48_658, 11_750_289, 465_789)
    assert made.shared == 0
