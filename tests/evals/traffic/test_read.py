"""Files of requests: both formats, with and without sessions, and what is refused."""

import pytest

from engine.errors import ConfigError
from evals.traffic.arrival import Arrival, cut, rate, rescaled
from evals.traffic.generate import fit
from evals.traffic.read import read_arrivals
from tests.data import real_data

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9305900,396,109
2023-11-16 18:15:47.6805900,879,55
"""
# Session, model, elapsed time, prompt, answer, kind; timestamps are 3 s apart
BURSTGPT = [
    ("s1", "ChatGPT", 4, 472, 18, "Conversation log"),
    ("", "ChatGPT", 1, 1087, 230, "API log"),
    ("s2", "GPT-4", 30, 417, 276, "Conversation log"),
    ("", "GPT-4", 2, 1360, 647, "API log"),
    ("s1", "ChatGPT", 5, 530, 101, "Conversation log"),
    ("", "ChatGPT", 0, 185, 0, "API log"),
    ("s3", "ChatGPT", 9, 87, 320, "Conversation log"),
    ("s2", "GPT-4", 12, 720, 90, "Conversation log"),
    ("", "ChatGPT", 0, 2048, 0, "API log"),
    ("", "ChatGPT", 1, 33, 11, "API log"),
    ("s1", "ChatGPT", 3, 660, 77, "Conversation log"),
    ("", "ChatGPT", 2, 910, 44, "API log"),
    ("s4", "GPT-4", 14, 1500, 512, "Conversation log"),
    ("", "ChatGPT", 1, 12, 9, "API log"),
    ("s3", "ChatGPT", 7, 450, 210, "Conversation log"),
    ("", "GPT-4", 3, 777, 130, "API log"),
    ("s4", "GPT-4", 0, 2100, 0, "Conversation log"),
    ("", "ChatGPT", 1, 64, 20, "API log"),
    ("s5", "ChatGPT", 6, 300, 180, "Conversation log"),
    ("", "ChatGPT", 2, 240, 65, "API log"),
]


def write(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def burstgpt(tmp_path):
    head = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
    lines = [head + "Log Type"]
    for number, (session, model, elapsed, asked, said, kind) in enumerate(BURSTGPT):
        numbers = f"{5 + 3 * number},{session},{elapsed},{model},{asked},{said},{asked + said}"
        lines.append(f"{numbers},{kind}")
    return write(tmp_path / "burst.csv", "\n".join(lines) + "\n")


def test_azure_comes_by_time_from_0(tmp_path):
    assert read_arrivals(write(tmp_path / "a.csv", AZURE)) == [
        Arrival(0.0, 374, 44),
        Arrival(1.0, 879, 55),
        Arrival(4.25, 396, 109),
    ]


def test_burstgpt_has_sessions_and_failures(burstgpt):
    found = read_arrivals(burstgpt)
    assert [x.at_s for x in found] == [3.0 * n for n in range(20)]
    assert [x.session or "" for x in found] == [row[0] for row in BURSTGPT]
    assert [(x.prompt_tokens, x.new_tokens) for x in found] == [row[3:5] for row in BURSTGPT]
    assert [n for n, x in enumerate(found) if x.failed] == [5, 8, 16]


def test_what_a_fit_finds_in_sessions(burstgpt):
    traffic = fit(read_arrivals(burstgpt))
    assert traffic.gap_s.mean == pytest.approx(3)
    assert traffic.gap_s.cv == pytest.approx(0)
    assert traffic.turns == pytest.approx(20 / 15)  # s1 has 3 requests; s2, s3 and s4 have 2
    assert traffic.failures == pytest.approx(3 / 20)
    assert traffic.think_s.mean == pytest.approx((12 + 18 + 15 + 24 + 12) / 5)
    repeated = (472 + 18) + (530 + 101) + (417 + 276) + (87 + 320) + (1500 + 512)
    total = sum(row[3] for row in BURSTGPT)
    assert traffic.message.mean == pytest.approx((total - repeated) / 20)


def test_older_burstgpt_has_no_sessions(tmp_path):
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    text += "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n"
    assert read_arrivals(write(tmp_path / "old.csv", text)) == [
        Arrival(0.0, 472, 18),
        Arrival(40.0, 1087, 0, failed=True),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "needs the columns"),
        ("a,b\n1,2\n", "has a, b"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        (AZURE + "2023-11-16 18:15:46,many,4\n", "line 5"),
        (AZURE + "2023-11-16 18:15:46\n", "line 5"),
        (AZURE + "2023-11-16 18:15:46,-1,4\n", "line 5: tokens below 0"),
        (AZURE + "yesterday,1,4\n", "line 5"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        read_arrivals(write(tmp_path / "x.csv", text))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.csv: No such file"):
        read_arrivals(tmp_path / "nothing.csv")


def test_another_rate_keeps_bursts_and_lengths(burstgpt):
    found = read_arrivals(burstgpt)
    assert rate(found) == pytest.approx(1 / 3)
    faster = rescaled(found[2:], 10.0)
    assert rate(faster) == pytest.approx(10)
    assert faster[0].at_s == 0
    assert [x.prompt_tokens for x in faster] == [x.prompt_tokens for x in found[2:]]


def test_a_cut_request_fits_the_positions(burstgpt):
    found = cut(read_arrivals(burstgpt), 1024, new_tokens=128)
    assert max(x.prompt_tokens for x in found) == 1024 - 128
    assert max(x.new_tokens for x in found) == 128
    assert found[0] == Arrival(0.0, 472, 18, "s1")


@pytest.mark.parametrize("new", [0, 64])
def test_an_answer_must_leave_room_for_a_prompt(new):
    with pytest.raises(ConfigError, match="new_tokens"):
        cut([], 64, new_tokens=new)


def test_a_rate_needs_time():
    for arrivals in ([], [Arrival(1.0, 1, 1)], [Arrival(1.0, 1, 1), Arrival(1.0, 1, 1)]):
        with pytest.raises(ConfigError, match="two times"):
            rate(arrivals)
    with pytest.raises(ConfigError, match="above 0"):
        rescaled([Arrival(0.0, 1, 1), Arrival(1.0, 1, 1)], 0.0)


def test_the_real_trace_is_read_whole():
    found = read_arrivals(real_data("traces/azure_2023_conv.csv"))
    assert len(found) == 19366
    assert found[1].at_s == pytest.approx(4.314579, abs=1e-5)
    traffic = fit(found)
    assert traffic.gap_s.cv == pytest.approx(1.094, abs=1e-3)
    assert traffic.message.mean == pytest.approx(1154.7, abs=0.1)
    assert (traffic.turns, traffic.failures) == (1, 0)


@pytest.mark.parametrize("time", ["nan", "inf", "-inf"])
def test_times_that_are_none_are_refused(tmp_path, time):
    columns = "Timestamp,Request tokens,Response tokens"
    (tmp_path / "a.csv").write_text(f"{columns}\n1,5,5\n{time},5,5\n")
    with pytest.raises(ConfigError, match=f"line 3: the time {time}"):
        read_arrivals(tmp_path / "a.csv")


@pytest.mark.parametrize("per_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(per_s):
    with pytest.raises(ConfigError, match="the rate must be above 0"):
        rescaled([Arrival(0.0, 5, 5), Arrival(1.0, 5, 5)], per_s)
