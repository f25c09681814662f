"""The journal: what is written is found again, by nobody else, after any end of the process; and it holds no key."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openzaya.errors import RSAError
from openzaya.ttc import journal as journal_module
from openzaya.ttc.completer import Capabilities, Rollout, Tail, Usage
from openzaya.ttc.config import RSAConfig
from openzaya.ttc.journal import Journal, MemoryJournal, make_run_key, without_credentials
from openzaya.ttc.results import Candidate, Round, RSAResult
from openzaya.ttc.rounds import Question

ROOT = Path(__file__).parent.parent.parent
CAPABILITIES = Capabilities("chat", "scripted", "server", "two_calls")
CONFIG = RSAConfig(n=2, c=2, t=1, beta=16, tau=8, final_budget=16)
QUESTION = Question.of("What is 2 + 2?")


def candidate_of(round_index: int = 0, slot: int = 0, text: str = "thought", status: str = "done") -> Candidate:
    usage = Usage(prompt=7, cached=2, completion=3, reasoning=1)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    rollout = Rollout(text, "4", True, "stop", usage, (call,), seconds=0.25, num_calls=2)
    done = status == "done"
    return Candidate(
        round_index,
        slot,
        (1, 0),
        status,  # type: ignore[arg-type]
        seed=5,
        rollout=rollout if done else None,
        tail=Tail(text[-8:], 3, True) if done else None,
        answer="4" if done else None,
        error=None if done else "the endpoint gave up",
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.sqlite"


def begun(path: Path, run_key: str = "run") -> Journal:
    journal = Journal.open(path)
    journal.begin(run_key, CONFIG, QUESTION, CAPABILITIES)
    return journal


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_rollout_is_found_by_its_place_and_its_call(path, kind):
    journal = begun(path) if kind == "file" else MemoryJournal()
    one = candidate_of(1, 3)
    journal.record("run", one, 0, "digest")
    assert journal.find("run", 1, 3, 0, "digest") == replace(one, is_resumed=True)
    for place in [("other", 1, 3, 0, "digest"), ("run", 0, 3, 0, "digest"), ("run", 1, 2, 0, "digest")]:
        assert journal.find(*place) is None
    assert journal.find("run", 1, 3, 1, "digest") is None, "another attempt"
    assert journal.find("run", 1, 3, 0, "of another prompt") is None


@given(st.text())
@example("\x00\ud800\U0001f642検\r\n\u2028")
def test_any_text_comes_back_unchanged(tmp_path_factory, text):
    with begun(tmp_path_factory.mktemp("text") / "run.sqlite") as journal:
        one = candidate_of(text=text)
        journal.record("run", one, 0, "d")
        assert journal.find("run", 0, 0, 0, "d") == replace(one, is_resumed=True)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_failure_is_asked_for_again_and_never_replaces_a_rollout(path, kind):
    journal = begun(path) if kind == "file" else MemoryJournal()
    journal.record("run", candidate_of(status="failed"), 0, "d")
    assert journal.find("run", 0, 0, 0, "d") is None
    journal.record("run", candidate_of(), 0, "d")
    journal.record("run", candidate_of(status="failed"), 0, "d")
    found = journal.find("run", 0, 0, 0, "d")
    assert found is not None and found.status == "done"
    if isinstance(journal, Journal):
        assert journal.load("run")["num_failures"] == 2


def test_resume_needs_the_same_settings_question_and_model(path):
    with begun(path) as journal:
        journal.begin("run", CONFIG, QUESTION, replace(CAPABILITIES, notes=("probed again",), context=99))
        with pytest.raises(RSAError, match=r"n=4 is now asked, n=2 is in the file.*same settings, or name"):
            journal.begin("run", CONFIG.model_copy(update={"n": 4}), QUESTION, CAPABILITIES)
        with pytest.raises(RSAError, match="question or its messages"):
            journal.begin("run", CONFIG, Question.of("What is 2 + 3?"), CAPABILITIES)
        with pytest.raises(RSAError, match="question or its messages"):
            journal.begin("run", CONFIG, replace(QUESTION, final={"tool_choice": "none"}), CAPABILITIES)
        with pytest.raises(RSAError, match="model 'larger' is now asked, 'scripted' is in the file"):
            journal.begin("run", CONFIG, QUESTION, replace(CAPABILITIES, model="larger"))
        journal.begin("another", CONFIG.model_copy(update={"n": 4}), QUESTION, CAPABILITIES)
        assert [run.run_key for run in journal.runs()] == ["run", "another"]


def test_a_run_that_is_not_finished_is_shown_as_far_as_it_is(path):
    with begun(path) as journal:
        journal.record("run", candidate_of(0, 1), 0, "b")
        journal.record("run", candidate_of(0, 0, status="failed"), 0, "a")
        journal.record("run", candidate_of(0, 0, "second attempt"), 1, "c")
        [run] = journal.runs()
        assert (run.num_done, run.num_rollouts, run.is_finished) == (2, 4, False)
        shown = journal.load("run")
    assert shown["state"] == "unfinished" and shown["answer"] is None and shown["num_failures"] == 1
    [one] = shown["rounds"]
    assert [c["rollout"]["reasoning"] for c in one["candidates"]] == ["second attempt", "thought"]
    assert shown["tokens"]["completion"] == 6 and one["answers"] == {"4": 2}
    assert shown["question"]["messages"][0]["content"] == "What is 2 + 2?"


def test_a_finished_run_is_loaded_as_its_result(path):
    rounds = (Round(0, (candidate_of(),), True, 1.0),)
    result = RSAResult(CONFIG, CAPABILITIES, rounds, (rounds[0].candidates[0],), 1.0)
    with begun(path) as journal:
        journal.finish("run", result.to_dict())
    with Journal.open(path, read_only=True) as journal:
        shown = journal.load("run")
        assert journal.runs()[0].is_finished
        with pytest.raises(RSAError, match="has no run 'none'; it has: run"):
            journal.load("none")
    assert shown["state"] == "finished"
    expected = json.loads(json.dumps(result.to_dict()))
    assert {key: shown[key] for key in expected} == expected


def test_threads_write_many_runs_at_once(path):
    journal = Journal.open(path)

    def work(number: int) -> None:
        journal.begin(f"run-{number}", CONFIG, QUESTION, CAPABILITIES)
        for slot in range(30):
            journal.record(f"run-{number}", candidate_of(0, slot), 0, str(slot))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.num_done for run in journal.runs()] == [30] * 6


# --- files that are not what they should be ---------------------------------------------------------


def test_other_files_are_refused_and_left_alone(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database, and long enough to be looked at as one" * 20)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (value)")
    connection.close()
    for file in (text, other):
        before = file.read_bytes()
        for read_only in (False, True):
            with pytest.raises(RSAError, match=r"no RSA journal; name another file"):
                Journal.open(file, read_only=read_only)
        assert file.read_bytes() == before
        assert sorted(each.name for each in tmp_path.iterdir()) == ["notes.txt", "other.sqlite"], "nothing left over"


def test_a_newer_format_is_refused(path, monkeypatch):
    monkeypatch.setattr(journal_module, "FORMAT", 2)
    begun(path).close()
    monkeypatch.undo()
    with pytest.raises(RSAError, match=r"has format 2, this version reads 1; update openzaya"):
        Journal.open(path)


def test_paths_that_cannot_be_used(tmp_path):
    with pytest.raises(RSAError, match="is a directory; name a file"):
        Journal.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RSAError, match=r"cannot be written: .*name another file"):
        Journal.open(tmp_path / "file" / "run.sqlite")
    with pytest.raises(RSAError, match="there is no journal"):
        Journal.open(tmp_path / "missing", read_only=True)
    (tmp_path / "empty").touch()
    with pytest.raises(RSAError, match="is empty; no run has begun"):
        Journal.open(tmp_path / "empty", read_only=True)
    Journal.open(tmp_path / "empty").close()
    assert not (tmp_path / "missing").exists()
    Journal.open(tmp_path / "new" / "?#% 1.sqlite").close()
    assert Journal.open(tmp_path / "new" / "?#% 1.sqlite", read_only=True).runs() == []


def test_a_damaged_file_is_named(path):
    with begun(path) as journal:
        for slot in range(50):
            journal.record("run", candidate_of(0, slot, "x" * 500), 0, "d")
    content = bytearray(path.read_bytes())
    content[4096:20480] = b"\xff" * 16384
    path.write_bytes(content)
    with pytest.raises(RSAError, match="it is damaged"), Journal.open(path) as journal:
        journal.load("run")


def test_a_full_disk_is_known_before_a_token_is_spent(path, monkeypatch):
    with begun(path) as journal:
        monkeypatch.setattr(journal_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
        with pytest.raises(RSAError, match=r"0 MB free, the journal of this run may take .*make room"):
            journal.begin("later", CONFIG, QUESTION, CAPABILITIES)
        journal.begin("run", CONFIG, QUESTION, CAPABILITIES)  # goes on: what it needs may be there already


def test_a_disk_that_fills_up_later_keeps_what_was_written(path):
    with begun(path) as journal:
        journal.record("run", candidate_of(), 0, "d")
        pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
        journal._connection.execute(f"PRAGMA max_page_count = {pages + 1}")
        with pytest.raises(RSAError, match="disk is full; make room and resume"):
            journal.record("run", candidate_of(0, 1, "x" * 100_000), 0, "d")
    with Journal.open(path) as journal:
        assert journal.find("run", 0, 0, 0, "d") and not journal.find("run", 0, 1, 0, "d")


def test_a_closed_journal_says_so(path):
    journal = begun(path)
    journal.close()
    journal.close()
    with pytest.raises(RSAError, match="is closed"):
        journal.record("run", candidate_of(), 0, "d")
    assert [each.name for each in path.parent.iterdir()] == [path.name], "one file is left"


# --- other processes --------------------------------------------------------------------------------

WRITER = """
import sys
from tests.ttc.test_journal import begun, candidate_of
journal = begun(sys.argv[1])
for slot in range(10**6):
    journal.record("run", candidate_of(0, slot), 0, "d")
    print(slot, flush=True)
"""


def test_one_process_at_a_time_and_a_killed_one_is_no_obstacle(path):
    command = [sys.executable, "-c", WRITER, str(path)]
    writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert writer.stdout is not None
    try:
        while int(writer.stdout.readline()) < 20:
            pass
        with pytest.raises(RSAError, match=f"in use by process {writer.pid}; wait for it, or name another file"):
            Journal.open(path)
        with Journal.open(path, read_only=True) as reader:
            assert reader.runs()[0].num_done >= 20, "it may be read meanwhile"
    finally:
        writer.send_signal(signal.SIGKILL)
        last = int((["20", *writer.stdout.read().split()])[-1])
        writer.wait()
        writer.stdout.close()
    with Journal.open(path) as journal:
        journal.begin("run", CONFIG, QUESTION, CAPABILITIES)
        assert all(journal.find("run", 0, slot, 0, "d") for slot in range(last + 1)), "what was reported is there"


def test_the_same_file_twice_in_one_process_is_refused_too(path):
    with begun(path), pytest.raises(RSAError, match=f"in use by process {os.getpid()}"):
        Journal.open(path)
    Journal.open(path).close()


# --- keys -------------------------------------------------------------------------------------------

SECRETS = ("hunter2", "s3cr3t", "sk-abcdefgh12345", "tok-99")


def test_no_key_reaches_the_file(path):
    leaky = (
        "POST https://user:hunter2@host.example:8000/v1?api_key=s3cr3t failed, header Authorization: Bearer tok-99, "
        "key sk-abcdefgh12345"
    )
    capabilities = replace(CAPABILITIES, notes=(leaky,))
    failed = replace(candidate_of(status="failed"), error=leaky)
    with Journal.open(path) as journal:
        journal.begin("run", CONFIG, QUESTION, capabilities)
        journal.record("run", failed, 0, "d")
        rounds = (Round(0, (candidate_of(), failed), True, 1.0),)
        journal.finish("run", RSAResult(CONFIG, capabilities, rounds, rounds[0].candidates[:1], 1.0).to_dict())
        files = b"".join(each.read_bytes() for each in path.parent.iterdir())
        assert b"host.example:8000/v1" in files
        assert not [secret for secret in SECRETS if secret.encode() in files]
    assert not [secret for secret in SECRETS if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://a:b@c.de/v1", "https://c.de/v1"),
        ("see http://c.de/v1?key=1&x=2, please", "see http://c.de/v1 please"),
        ("http://c.de/#token", "http://c.de/"),
        ("mail me@c.de", "mail me@c.de"),
        ("what? nothing", "what? nothing"),
    ],
)
def test_credentials_are_cut_out_of_urls(text, expected):
    assert without_credentials(text) == expected


def test_run_keys_tell_runs_apart():
    keys = {
        make_run_key(CONFIG, QUESTION),
        make_run_key(CONFIG.model_copy(update={"seed": 1}), QUESTION),
        make_run_key(CONFIG, Question.of("else")),
        make_run_key(CONFIG, QUESTION, "line-3"),
    }
    assert len(keys) == 4
    assert make_run_key(CONFIG, QUESTION) in keys
