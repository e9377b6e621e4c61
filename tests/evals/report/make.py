"""Records made by hand, and folders of them."""

import json

import msgspec

from evals.record import NO_CONTEXT, Record

FACTS = {
    "model": "models/test",
    "weights": "ab" * 32,
    "dtype": "bfloat16",
    "settings": {"method": ["dense", "headrace", "quest"], "settings": {}},
    "versions": {"torch": "2.11.0"},
    "commit": "abc1234",
    "hardware": {"device": "a CPU, 2 cores"},
    "starts": [{"date": "2026-01-01T00:00:00+00:00", "command": "headrace-eval run --suite x"}],
}


def record(
    number=0, method="dense", budget=None, score=100.0, *,
    suite="ruler", family="single needle", task="niah", length=4096, **more,
):  # fmt: skip
    """One answer, of sample `number`."""
    settings = {"turn": 0, "prompt_sha256": f"prompt of {task} {length} {number}"} | more
    if method == NO_CONTEXT:
        settings["prompt_sha256"] = "no context"
    return Record(
        id=f"{suite}/{task}/{length}/{number}", suite=suite, task=task, family=family,
        length=length, method=method, budget=budget, score=score, **settings,
    )  # fmt: skip


def records(method, scores, budget=None, **more):
    """Answers of samples 0, 1, ...; None leaves a sample out."""
    kept = [(number, score) for number, score in enumerate(scores) if score is not None]
    return [record(number, method, budget, score, **more) for number, score in kept]


def floor(count, **more):
    """Answers without a context, all wrong."""
    return records(NO_CONTEXT, [0.0] * count, **more)


def folder(path, made, facts=FACTS):
    """A run's folder."""
    path.mkdir(parents=True, exist_ok=True)
    lines = [msgspec.json.encode(each) + b"\n" for each in made]
    (path / "records.jsonl").write_bytes(b"".join(lines))
    if facts is not None:
        (path / "run.json").write_text(json.dumps(facts))
    return path
