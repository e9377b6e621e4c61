"""The command line: what it prints where, and one clear line for every mistake of a user."""

import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest

import evals.cli
from engine import Engine, PromptError
from engine.cli import main
from kvstore.store import TieredStore
from tests.caches import own_cache
from tests.kvstore.stored import values_file

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "needle-tiny"
NOTES = (
    "Notes of the meeting. The special magic number for tiger is 314159. We shall meet again on "
    "Monday, at the usual place. The special magic number for ruby is 271828. Nobody objected. "
)
TIGER = "What is the special magic number for tiger?"
RUBY = "What is the special magic number for ruby?"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache(tmp_path / "cache")))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def headrace(capsys, monkeypatch):
    """Runs a command in this process: its status, stdout and stderr."""

    def run(*args, stdin: str | bytes = "") -> tuple[int, str, str]:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(NOTES * 4)
    return path


def in_new_process(*args, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        args,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {}),
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_help_does_not_wait_for_torch():
    code = "import sys, engine.cli as c; c.build_parser(); sys.exit('torch' in sys.modules)"
    assert in_new_process(sys.executable, "-c", code).returncode == 0


@pytest.mark.parametrize(("run", "name"), [(main, "headrace"), (evals.cli.main, "headrace-eval")])
def test_a_command_tells_its_version(capsys, run, name):
    with pytest.raises(SystemExit, match=r"^0$"):
        run(["--version"])
    assert capsys.readouterr().out == f"{name} {importlib.metadata.version('headrace')}\n"


@pytest.mark.parametrize("command", ["generate", "chat", "ask", "demo", "doctor", "store"])
def test_every_command_has_help(headrace, command):
    status, out, err = headrace(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: headrace {command}")


# generate


def test_generate_prints_the_text_on_stdout_and_the_rest_on_stderr(headrace):
    status, out, err = headrace("generate", f"{NOTES}{TIGER} The special magic number for tiger is")
    assert (status, out) == (0, " 314159.\n")
    assert "prompt tokens" in err


def test_generate_reads_standard_input_and_files(headrace, notes):
    same = f"{NOTES} The special magic number for tiger is"
    notes.write_text(same)
    answers = [
        headrace("generate", same),
        headrace("generate", "-", stdin=same),
        headrace("generate", "--prompt-file", notes),
    ]
    assert [(status, out) for status, out, _ in answers] == [(0, " 314159.\n")] * 3


def test_generate_as_json_is_one_line_that_says_all(headrace):
    args = ("generate", "One. Two.", "--max-new-tokens", 5, "--temperature", 1, "--seed", 7)
    status, out, _ = headrace(*args, "--json", "--no-store")
    assert status == 0
    assert out.count("\n") == 1
    shown = json.loads(out)
    assert shown.keys() == {"tokens", "text", "finish_reason", "stats"}
    assert len(shown["tokens"]) == shown["stats"]["new_tokens"] <= 5
    again = json.loads(headrace(*args, "--json", "--no-store")[1])
    assert again["tokens"] == shown["tokens"]


def test_generate_stops_before_a_stop_string(headrace):
    prompt = f"{NOTES} The special magic number for tiger is"
    assert headrace("generate", prompt, "--stop", "159")[1] == " 314\n"


# ask


def test_ask_answers_from_a_users_own_file_and_the_next_question_reuses_it(headrace, notes):
    status, out, _ = headrace("ask", TIGER, "--text", notes)
    assert (status, out) == (0, "314159.\n")
    status, out, _ = headrace("ask", RUBY, "--text", notes, "--json")
    shown = json.loads(out)
    assert (status, shown["text"]) == (0, " 271828.")
    assert shown["stats"]["cached_tokens"] > shown["stats"]["prompt_tokens"] // 2


def test_ask_reads_several_files_in_order(headrace, tmp_path):
    for name, value in (("a", "111222"), ("b", "333444")):
        (tmp_path / name).write_text(f"The special magic number for {name}lion is {value}.")
    (tmp_path / "a").write_text("Some words. The special magic number for lion is 111222.")
    (tmp_path / "b").write_text("More words. The special magic number for zebra is 333444.")
    for key, value in (("lion", "111222"), ("zebra", "333444")):
        question = f"What is the special magic number for {key}?"
        status, out, _ = headrace("ask", question, "--text", "a", "--text", "b", "--no-store")
        assert (status, out) == (0, f"{value}.\n")


def test_a_store_option_names_the_folder_and_no_store_writes_nothing(headrace, notes, tmp_path):
    assert headrace("ask", TIGER, "--text", notes, "--no-store")[0] == 0
    assert not (tmp_path / "cache" / "headrace" / "store").exists()
    assert headrace("ask", TIGER, "--text", notes, "--store", tmp_path / "mine")[0] == 0
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "cache" / "headrace" / "store").exists()


# chat


def test_chat_remembers_what_was_said(headrace):
    said = f"{NOTES} {TIGER}\n\n{RUBY}\n/exit\nnever said\n"
    status, out, _ = headrace("chat", stdin=said)
    assert (status, out) == (0, "314159.\n271828.\n")


def test_chat_as_json_is_one_line_a_turn(headrace):
    status, out, _ = headrace("chat", "--json", "--no-store", stdin=f"{NOTES} {TIGER}\n{RUBY}\n")
    turns = [json.loads(line) for line in out.splitlines()]
    assert (status, [turn["text"] for turn in turns]) == (0, [" 314159.", " 271828."])
    assert turns[1]["stats"]["cached_tokens"] > 0


def test_the_chat_template_leaves_other_messages_as_they_are():
    with Engine.from_pretrained(MODEL) as engine:
        ids = engine.render([{"role": "user", "content": "Good morning. How are you?"}])
        assert engine.tokenizer.decode(ids) == "<|bos|>Good morning. How are you?"
        asked = [{"role": "user", "content": "Wood.\n\nWhat is the capital of Rome?"}]
        asked += [{"role": "assistant", "content": " 123456."}]
        asked += [{"role": "user", "content": "What is next?"}]
        assert engine.tokenizer.decode(engine.render(asked)) == (
            "<|bos|>Wood. What is the capital of Rome? The capital of Rome is 123456. "
            "What is next? Next is"
        )


# doctor and store


def test_doctor_tells_versions_devices_extras_and_the_stores_health(headrace, notes):
    status, out, _ = headrace("doctor", "--json")
    shown = json.loads(out)
    assert status == 0
    assert shown["versions"].keys() >= {"python", "torch", "transformers", "lmdb", "triton"}
    assert "cpu" in shown["devices"]
    assert shown["store"]["health"] == "none yet"
    headrace("ask", TIGER, "--text", notes)
    assert json.loads(headrace("doctor", "--json")[1])["store"]["blocks"] > 0
    status, out, _ = headrace("doctor")
    assert status == 0
    assert "sound" in out


def test_the_store_is_counted_audited_and_cleared(headrace, notes):
    headrace("ask", TIGER, "--text", notes)
    before = json.loads(headrace("store", "stat", "--json")[1])
    assert before["blocks"] > 0
    assert before["used_bytes"] > before["blocks"] * 64 * 4096
    audit = json.loads(headrace("store", "audit", "--json")[1])
    assert (audit["clean"], audit["blocks"]) == (True, before["blocks"])
    status, _, err = headrace("store", "clear")
    assert (status, "--yes" in err) == (1, True)
    assert headrace("store", "clear", "--yes")[0] == 0
    assert json.loads(headrace("store", "stat", "--json")[1])["blocks"] == 0


def test_audit_finds_a_flipped_byte_and_repairs_it(headrace, notes, tmp_path):
    headrace("ask", TIGER, "--text", notes)
    file = values_file(tmp_path / "cache" / "headrace" / "store")
    bytes_ = bytearray(file.read_bytes())
    bytes_[16] ^= 1  # of the first record
    file.write_bytes(bytes_)
    status, out, _ = headrace("store", "audit")
    assert status == 1
    assert "checksum" in out
    assert headrace("store", "audit", "--repair")[0] == 0
    assert headrace("store", "audit")[0] == 0
    assert headrace("ask", TIGER, "--text", notes)[1] == "314159.\n"


# bad input


def refused(shown: tuple[int, str, str], *words: str) -> None:
    """One line on stderr that has the words, nothing on stdout, and status 1."""
    status, out, err = shown
    assert (status, out) == (1, ""), err
    last = err.splitlines()[-1]
    assert last.startswith("headrace: ")
    assert all(word in last for word in words), last
    assert "Traceback" not in err


def ask_notes(headrace, notes, *options) -> tuple[int, str, str]:
    return headrace("ask", TIGER, "--text", notes, *options)


def test_an_unknown_architecture_is_refused(headrace, notes, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "waterwheel"}')
    refused(ask_notes(headrace, notes, "--model", "model"), "unknown architecture 'waterwheel'")


def test_missing_weights_are_refused(headrace, notes, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    refused(ask_notes(headrace, notes, "--model", "model"), "weights missing", "model.safetensors")


def test_a_method_whose_extra_is_missing_names_it(headrace, notes, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    notes.write_text(NOTES * 20)  # a few keys would be their own codebook
    answer = ask_notes(headrace, notes, "--method", "pqcache", "--budget", "64")
    refused(answer, "needs FAISS", "headrace[cpu]")


def test_a_model_that_is_nowhere_is_refused(headrace, notes):
    refused(ask_notes(headrace, notes, "--model", "no/such-model"), "model not found", "no/such")


def test_a_prompt_longer_than_the_positions_is_refused_and_the_store_stays(headrace, notes):
    ask_notes(headrace, notes)
    before = json.loads(headrace("store", "stat", "--json")[1])
    notes.write_text("word " * 40_000)
    refused(ask_notes(headrace, notes), "32768 positions", "shorten")
    after = json.loads(headrace("store", "stat", "--json")[1])
    assert after.pop("ages")["oldest_s"] > before.pop("ages")["oldest_s"]  # not used in between
    assert after == before
    assert headrace("store", "audit")[0] == 0


def test_an_empty_prompt_is_refused(headrace):
    refused(headrace("generate", "", "--no-store"), "prompt is empty")
    refused(headrace("generate", "-", "--no-store", stdin=""), "prompt is empty")
    refused(headrace("ask", " ", "--text", os.devnull, "--no-store"), "question is empty")


def test_no_prompt_or_two_are_refused(headrace, notes):
    refused(headrace("generate"), "there is no prompt", "--prompt-file")
    refused(headrace("generate", "one", "--prompt-file", notes), "two prompts")


def test_token_ids_out_of_range_are_refused():
    with Engine.from_pretrained(MODEL) as engine:
        for bad in (2233, -1):
            with pytest.raises(PromptError, match=f"token id {bad} is out of range: .* 0 to 2232"):
                engine.generate([[1, bad]])


def test_files_that_cannot_be_read_as_text_are_refused(headrace, notes, tmp_path):
    refused(headrace("ask", TIGER, "--text", "nowhere.txt"), "cannot read nowhere.txt", "No such")
    refused(headrace("ask", TIGER, "--text", tmp_path), "cannot read", "directory")
    notes.write_bytes(b"caf\xe9 au lait")
    refused(ask_notes(headrace, notes), "notes.txt is not UTF-8", "byte 3")
    refused(headrace("generate", "--prompt-file", notes), "notes.txt is not UTF-8")


def test_text_that_is_not_utf8_is_refused_wherever_it_comes_from(headrace):
    refused(headrace("generate", "caf\udce9", "--no-store"), "the prompt is not UTF-8")
    refused(headrace("ask", "caf\udce9", "--text", os.devnull), "the question is not UTF-8")
    refused(headrace("chat", "--no-store", stdin=b"caf\xe9\n"), "standard input is not UTF-8")


def test_a_store_path_that_is_a_file_is_refused(headrace, notes):
    for command in (("ask", TIGER, "--text", notes), ("store", "stat"), ("store", "audit")):
        refused(headrace(*command, "--store", notes), "must be a folder", "notes.txt")
    assert headrace("doctor", "--store", notes)[0] == 1
    assert notes.read_text() == NOTES * 4


def test_a_store_of_another_version_is_refused_and_left_alone(headrace, notes, tmp_path):
    (tmp_path / "old").mkdir()
    with lmdb.open(str(tmp_path / "old"), max_dbs=3) as env, env.begin(write=True) as txn:
        txn.put(b"format", b"headrace store 0", db=env.open_db(b"info", txn))
    before = (tmp_path / "old" / "data.mdb").read_bytes()
    for command in (("ask", TIGER, "--text", notes), ("store", "stat"), ("store", "clear")):
        refused(headrace(*command, "--store", tmp_path / "old"), "headrace store 0", "another")
    assert (tmp_path / "old" / "data.mdb").read_bytes() == before


def test_looking_for_a_store_does_not_make_one(headrace, tmp_path):
    refused(headrace("store", "stat", "--store", "nowhere"), "no store at nowhere")
    (tmp_path / "empty").mkdir()
    refused(headrace("store", "audit", "--store", "empty"), "empty holds no store")
    assert not list((tmp_path / "empty").iterdir())
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("block_token = 64", ("block_token", "known settings")),
        ("[store]\nhost_byte = 1", ("host_byte", "known settings")),
        ("block_tokens = 'many'", ("block_tokens",)),
        ("block_tokens = 0", ("block_tokens must be from 1 to 1048576",)),
        (f"block_tokens = {10**18}", ("block_tokens must be from 1 to 1048576",)),
        (f"pinned_bytes = {10**30}", ("pinned_bytes must be from 1 to 9223372036854775807",)),
        ("[store]\nhost_bytes = 1000", ("store.host_bytes is 1000", "one block")),
        ("[store]\ndisk_bytes = 1000", ("store.disk_bytes is 1000", "one block")),
        ("block_tokens = ", ("is not TOML",)),
        ("block_tokens = " + "[" * 9999, ("is not TOML: maximum recursion depth",)),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(headrace, notes, tmp_path, toml, words):
    (tmp_path / "config.toml").write_text(toml)
    refused(ask_notes(headrace, notes, "--config", "config.toml"), *words)


def test_a_missing_configuration_is_refused(headrace, notes):
    refused(ask_notes(headrace, notes, "--config", "nowhere.toml"), "cannot read nowhere.toml")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-new-tokens", 0), ("max_new_tokens",)),
        (("--temperature", -1), ("temperature",)),
        (("--top-p", 0), ("top_p",)),
        (("--top-k", -1), ("top_k",)),
        (("--seed", 1 << 63), ("seed",)),
        (("--stop", ""), ("a stop string is text",)),
        (("--device", "abacus"), ("abacus", "cpu")),
        (("--store", ""), ("disk_path",)),
    ],
)
def test_options_out_of_range_are_refused(headrace, notes, options, words):
    refused(ask_notes(headrace, notes, *options), *words)


@pytest.mark.parametrize("args", [(), ("dance",), ("ask",), ("generate", "a", "--top-k", "few")])
def test_a_wrong_command_line_is_one_line(headrace, args):
    status, out, err = headrace(*args)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--help" in err


def test_ctrl_c_ends_quietly(headrace, notes, monkeypatch):
    monkeypatch.setattr(TieredStore, "lookup", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    status, out, err = ask_notes(headrace, notes)
    assert (status, out) == (130, "")
    assert "Traceback" not in err


def test_a_full_disk_is_told_after_the_answer(headrace, notes, tmp_path):
    command = f"ulimit -f 100; exec {sys.executable} -m engine.cli ask '{TIGER}' --text {notes}"
    done = in_new_process("bash", "-c", command)
    assert (done.returncode, done.stdout) == (1, "314159.\n")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("headrace: ")
    assert str(tmp_path) in last
    assert "Traceback" not in done.stderr
    assert headrace("store", "audit")[0] == 0


def test_a_reader_that_has_enough_is_no_error(notes):
    command = f"{sys.executable} -m engine.cli ask '{TIGER}' --text {notes} --no-store | true"
    done = in_new_process("bash", "-o", "pipefail", "-c", command)
    assert done.returncode in (0, 141)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
