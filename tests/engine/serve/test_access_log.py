"""The way of the access log's lines to a file or a pipe."""

import logging
import os
import sys
import threading
from contextlib import suppress

import pytest

from engine.errors import ConfigError
from engine.serve import access_log
from engine.serve.access_log import AccessLog


def said(text: str) -> logging.LogRecord:
    return logging.LogRecord("access", logging.INFO, "", 0, "%s", (text,), None)


def test_lines_are_added_to_a_file(tmp_path):
    file = tmp_path / "access.log"
    file.write_text("before\n")
    log = AccessLog(str(file))
    for number in range(3):
        log.emit(said(str(number)))
    log.close()
    assert file.read_text() == "before\n0\n1\n2\n"


def test_a_file_that_cannot_be_written_is_a_mistake(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write serve\.access_log"):
        AccessLog(str(tmp_path / "none" / "access.log"))


def test_a_pipe_that_nobody_reads_holds_up_nobody(monkeypatch):
    """Not the server, and not its end."""
    monkeypatch.setattr(access_log, "LAST_S", 0.1)
    monkeypatch.setattr(access_log, "WAITING", 100)
    reader, writer = os.pipe()
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        log = AccessLog("-")
        for _ in range(200):
            log.emit(said("x" * 10_000))
        assert log.lost > 0
        log.close()
        pipe.flush()  # as the interpreter does at its end: it must not wait for that thread
        assert log._thread.is_alive()
        os.set_blocking(reader, False)
        while log._thread.is_alive():
            with suppress(BlockingIOError):
                os.read(reader, 1 << 20)
    os.close(reader)


def test_a_full_pipe_that_makes_nobody_wait_takes_no_time_of_the_processor(monkeypatch):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        calls = []
        full = threading.Event()
        select = access_log.select.select

        def counted(*args):
            calls.append(args)
            full.set()
            return select(*args)

        monkeypatch.setattr(access_log.select, "select", counted)
        log = AccessLog("-")
        lines = 30
        for number in range(lines):
            log.emit(said(f"{number:02} " + "x" * 10_000))
        assert full.wait(10)
        read = b""
        while read.count(b"\n") < lines:
            read += os.read(reader, 1 << 16)
        log.close()
    os.close(reader)
    assert [line[:2] for line in read.splitlines()] == [b"%02d" % n for n in range(lines)]
    assert log.lost == 0
    assert len(calls) < 1000
