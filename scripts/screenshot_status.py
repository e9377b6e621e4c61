#!/usr/bin/env python3
"""The status page of a server under load, as a picture: docs/status.png.

Starts a server of the reference model in this process, on a free port of this machine, and lets
clients ask it for a while, about a few documents and in conversations of different length.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.service.schedule import ScheduleConfig
from kvstore.config import StoreConfig
from tests.engine.serve.browser import Browser, browser, missing
from tests.engine.serve.server import ROOT, Running, running

SENTENCES = (
    "The channel brings the water of the river to the wheel.",
    "A gate at its head says how much of it may come.",
    "In a dry summer the mill stands still for weeks.",
    "The miller keeps the gate, and the book of who has ground how much.",
    "What the wheel does not need runs back into the river below the mill.",
)
SIZE = (1200, 1165)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of load before (%(default)s)")
    parser.add_argument("--clients", type=int, default=6, help="at once (%(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="(%(default)s)")
    args = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    args.folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        store = StoreConfig(host_bytes=48 << 20, disk_path=folder, disk_bytes=1 << 30)
        schedule = ScheduleConfig(max_running=args.clients - 1, step_tokens=256)
        with running("reference", store=store, schedule=schedule) as server:
            shoot(server, args.seconds, args.clients, args.folder)


def shoot(server: Running, seconds: float, clients: int, folder: Path) -> None:
    """Load the server; look at its page in the middle of it."""
    over = threading.Event()
    with server.http() as http:
        texts = [{"id": f"chapter-{n}", "text": text(n, 30)} for n in range(4)]
        http.post("/v1/documents", json={"documents": texts}).raise_for_status()
    with ThreadPoolExecutor(clients) as threads, browser() as window:
        jobs = [threads.submit(client, server, number, over) for number in range(clients)]
        try:
            over.wait(seconds)  # nobody sets it yet
            photograph(window, server, folder / "status.png")
        finally:
            over.set()
        for job in jobs:
            job.result()


def photograph(window: Browser, server: Running, path: Path) -> None:
    window.resize(*SIZE)
    window.open(server.url)
    window.wait("!document.getElementById('board').hidden")
    window.screenshot(path)
    complaints = window.complaints()
    if complaints:
        sys.exit("\n".join(complaints))
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


def client(server: Running, number: int, over: threading.Event) -> None:
    """Asks one thing after the other until it is over."""
    random_ = random.Random(number)
    with server.client() as openai:
        while not over.is_set():
            if random_.random() < 0.35:
                documents = random_.sample([f"chapter-{n}" for n in range(4)], 2)
                openai.chat.completions.create(
                    model=server.model,
                    messages=[{"role": "user", "content": "What does the miller keep?"}],
                    max_tokens=random_.randint(10, 60),
                    temperature=0.7,
                    extra_body={"documents": documents},
                )
                continue
            with openai.completions.create(
                model=server.model,
                prompt=text(random_.randint(0, 9), random_.choice((5, 20, 60, 120))),
                max_tokens=random_.randint(20, 120),
                temperature=0.7,
                stream=True,
            ) as stream:
                for _ in stream:
                    pass
            time.sleep(random_.expovariate(2))


def text(seed: int, sentences: int) -> str:
    """The same for a seed, and the start of what is longer."""
    random_ = random.Random(seed)
    return " ".join(random_.choice(SENTENCES) for _ in range(sentences))


if __name__ == "__main__":
    main()
