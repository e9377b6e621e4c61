"""Spans tell where the time of a request goes: at least 95 % of it, through the real server."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from engine.service.schedule import ScheduleConfig
from engine.service.spans import NAMES
from tests.engine.serve.server import running

SENTENCE = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
LEAST = 0.95
PAUSE_S = 0.025
PER_TOKEN = {"decode", "sample", "detokenise"}


def complete(client: openai.OpenAI, model: str, sentences: int, *, stream: bool) -> None:
    answer: Any = client.completions.create(
        model=model, prompt=SENTENCE * sentences, max_tokens=24, temperature=0, stream=stream
    )
    if stream:
        assert len(list(answer)) > 0


def chat(client: openai.OpenAI, model: str, documents: list[Any], *, stream: bool) -> None:
    answer: Any = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is green?"}],
        max_tokens=16,
        temperature=0,  # by chance, an answer may be its end alone
        stream=stream,
        extra_body={"documents": documents} if documents else {},
    )
    if stream:
        assert len(list(answer)) > 0


def test_spans_cover_the_wall_time_of_requests() -> None:
    with (
        running(schedule=ScheduleConfig(step_tokens=128)) as server,
        server.client() as client,
        server.http() as http,
        ThreadPoolExecutor(8) as threads,
    ):
        texts = [{"text": SENTENCE * 8 + f"Number {n}."} for n in range(3)]
        body = {"documents": [{"id": f"d{n}", **text} for n, text in enumerate(texts)]}
        http.post("/v1/documents", json=body).raise_for_status()
        count = 1
        for stream in (True, False):  # the second time, prompts find their KV in the store
            work = []
            for sentences in (1, 4, 16, 16):
                args = (client, server.model, sentences)
                work.append(threads.submit(complete, *args, stream=stream))
            for documents in ([], ["d0", "d2"], texts[:2]):
                args = (client, server.model, documents)
                work.append(threads.submit(chat, *args, stream=stream))
            for job in work:
                job.result()
            count += len(work)
        traces = http.get("/traces").json()["traces"]
    assert len(traces) == count
    wall_s = sum(trace["wall_s"] for trace in traces)
    assert sum(trace["coverage"] * trace["wall_s"] for trace in traces) >= LEAST * wall_s
    for trace in traces:  # a busy machine may keep a thread waiting between two spans
        lost_s = (1 - trace["coverage"]) * trace["wall_s"]
        assert lost_s <= max(PAUSE_S, (1 - LEAST) * trace["wall_s"]), trace
    names = {name for trace in traces for name in trace["shares"]}
    assert names >= set(NAMES) - {"swap"}
    answered = [trace for trace in traces if trace["name"] == "POST /v1/completions"]
    assert all(set(trace["shares"]) >= PER_TOKEN for trace in answered)
