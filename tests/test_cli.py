"""Every verb: help, results, exit codes, and one clear line for whatever a user can get wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openzaya import cli
from openzaya.data.chat import render
from openzaya.infer.chat import ChatSession
from tests.command import error_line, openzaya
from tests.train import miniature

VERBS = (
    "run",
    "train",
    "rl",
    "calibrate",
    "config",
    "init",
    "convert",
    "inspect",
    "generate",
    "chat",
    "rsa",
    "eval",
    "quality",
    "serve",
    "report",
    "doctor",
    "plan",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write_babbling_model(tmp_path_factory.mktemp("checkpoint") / "model")


# --- help and usage -------------------------------------------------------------------------------


def test_the_verbs_are_these() -> None:
    finished = openzaya("--help")
    assert finished.code == 0
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
    assert tuple(names) == VERBS
    assert all(re.search(rf"^  {verb} ", finished.out, re.MULTILINE) for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_an_example_of_the_verb(verb: str) -> None:
    finished = openzaya(verb, "--help")
    assert finished.code == 0
    last_paragraph = " ".join(finished.out.strip().split("\n\n")[-1].split())
    assert last_paragraph.startswith(f"Example: openzaya {verb} ")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("dance",),
        ("run",),
        ("convert", "a"),
        ("convert", "a", "b"),
        ("inspect",),
        ("inspect", "x", "--verbose"),
        ("generate", "m"),
        ("generate", "m", "p", "--top-p", "1.5"),
        ("generate", "m", "p", "--temperature", "-1"),
        ("generate", "m", "p", "--temperature", "warm"),
        ("generate", "m", "p", "--temperature", "nan"),
        ("generate", "m", "p", "--max-tokens", "0"),
        ("generate", "m", "p", "--seed", "99999999999999999999"),
        ("eval", "m", "--k", "0"),
        ("rsa", "--model", "m"),
        ("rsa", "x", "--data", "y", "--model", "m"),
        ("rsa", "x"),
        ("rsa", "x", "--model", "m", "--resume"),
        ("rsa", "x", "--model", "m", "--journal", "j", "--no-journal"),
        ("rsa", "x", "--endpoint", "http://localhost", "--quantize", "int4"),
        ("rsa", "x", "--model", "m", "--concurrency", "0"),
        ("init", "smoke"),
        ("init", "smoke", "d", "--seed", "x"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2_with_the_usage(arguments: tuple[str, ...]) -> None:
    finished = openzaya(*arguments)
    assert finished.code == 2
    assert "Usage: " in finished.err + finished.out
    assert "Traceback" not in finished.err


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys; import openzaya.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=Path(__file__).parents[1])


# --- config ---------------------------------------------------------------------------------------


def test_config_shows_every_value_and_its_origin(tmp_path: Path) -> None:
    recipe = miniature.write_phase(tmp_path)
    finished = openzaya("config", recipe, "optimizer.weight_decay=0")
    assert finished.code == 0
    assert re.search(r"optimizer.weight_decay = 0.0 +# override optimizer.weight_decay=0", finished.out)
    assert re.search(rf"context_length = 128 +# {re.escape(str(recipe))}:5", finished.out)
    assert re.search(r"optimizer.momentum = 0.95 +# default", finished.out)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "unknown key 'stepz' (override stepz=3); did you mean 'steps'?"),
        ("optimizer.wieght_decay=1", "did you mean 'weight_decay'?"),
        ("steps=many", "steps='many'"),
        ("steps", "is not of the form key.sub=value"),
        ("data.sources.7.weight=1", "'data.sources' is a list of 2 entries"),
        ("steps.deep=1", "is the plain value 12, not a table"),
        ("kind=eval", "kind='eval'"),
    ],
)
def test_overrides_that_do_not_fit_are_one_line(tmp_path: Path, override: str, message: str) -> None:
    recipe = miniature.write_phase(tmp_path)
    for verb in ("config", "train"):
        extra = ("--out", tmp_path / "out") if verb == "train" else ()
        assert message in openzaya(verb, recipe, override, *extra).err
        assert error_line(openzaya(verb, recipe, override, *extra))
    assert not (tmp_path / "out").exists()


def test_train_refuses_a_recipe_of_another_kind(tmp_path: Path) -> None:
    recipe = tmp_path / "05-eval.toml"
    recipe.write_text('kind = "eval"\nmodel = "x"\n')
    assert "is of kind 'eval', not 'train'" in error_line(openzaya("train", recipe, "--out", tmp_path / "o"))


# --- generate and chat ----------------------------------------------------------------------------


def test_generate_prints_what_the_session_says(checkpoint: Path) -> None:
    finished = openzaya("generate", checkpoint, "Add", "--max-tokens", 12, "--seed", 4, "--top-k", 20, "--min-p", 0.01)
    assert finished.code == 0
    assert finished == openzaya(
        "generate", checkpoint, "Add", *["--max-tokens", "12", "--seed", "4", "--top-k", "20", "--min-p", "0.01"]
    )
    assert finished != openzaya(
        "generate", checkpoint, "Add", *["--max-tokens", "12", "--seed", "5", "--top-k", "20", "--min-p", "0.01"]
    )
    greedy = openzaya("generate", checkpoint, "Add", *["--max-tokens", "12", "--temperature", "0"])
    assert greedy == openzaya(
        "generate", checkpoint, "Add", *["--max-tokens", "12", "--temperature", "0", "--seed", "9", "--top-k", "1"]
    )


def test_generate_reads_stdin(checkpoint: Path) -> None:
    options = ("--max-tokens", "5", "--temperature", "0")
    given = openzaya("generate", checkpoint, "-", *options, stdin="Grüße".encode())
    assert given == openzaya("generate", checkpoint, "Grüße", *options)


HOSTILE = [
    (("generate", "M", "x", "--top-p", "0"), b"", "top_p=0 keeps no token"),
    (("generate", "M", "x", "--temperature", "inf"), b"", "temperature"),
    (("generate", "M", "-"), b"\xff\xfe\x00binary", "is not utf-8 text"),
    (("chat", "M"), b"\xff\xfe\x00binary\n", "is not utf-8 text"),
    (("generate", "M", "x y " * 600), b"", "fewer than the model's 1024 positions"),
    (("generate", "M", "x y " * 600, "--chat"), b"", "fewer than the model's 1024 positions"),
    (("generate", "M", "bad \udcff"), b"", "not valid Unicode"),
    (("generate", "M", "x", "--dtype", "int4"), b"", "int4"),
    (("generate", "M", "x", "--device", "gpu9"), b"", "device 'gpu9' cannot be used here"),
    (("generate", "/dev/null", "x"), b"", "is a file, expected a checkpoint directory"),
    (("generate", "nowhere", "x"), b"", "no such directory"),
    (("chat", "nowhere"), b"", "no such directory"),
    (("eval", "nowhere"), b"", "no such directory"),
    (("eval", "M", "--families", "sortng"), b"", "unknown problem family 'sortng'; did you mean 'sorting'?"),
    (("eval", "M", "--families", ","), b"", "unknown problem family ''"),
    (("eval", "M", "--temperature", "0"), b"", "temperature=0.0"),
    (("inspect", "nowhere"), b"", "no such directory"),
    (("convert", "nowhere", "x", "--to", "native"), b"", "no such directory"),
    (("report", "nowhere"), b"", "nowhere is not a directory"),
    (("report", "/dev/null"), b"", "is not a directory"),
    (("run", "nowhere"), b"", "holds no stage files"),
    (("train", "nowhere.toml"), b"", "cannot read recipe nowhere.toml"),
    (("config", "/dev"), b"", "cannot read recipe /dev"),
]


@pytest.mark.parametrize(("arguments", "stdin", "message"), HOSTILE, ids=[" ".join(row[0])[:50] for row in HOSTILE])
def test_hostile_input_is_one_clear_line(
    checkpoint, tmp_path, monkeypatch, arguments, stdin: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(checkpoint) if argument == "M" else argument for argument in arguments]
    finished = openzaya(*given, stdin=stdin)
    error_line(finished)
    assert message in finished.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [("--top-k", "1000000000"), ("--min-p", "1"), ("--temperature", "1e-30"), ()], ids=str
)
@pytest.mark.parametrize("prompt", ["", "<|im_end|>", "\0", "日本🙂"], ids=ascii)
def test_odd_but_allowed_input_works(checkpoint: Path, prompt: str, options: tuple[str, ...]) -> None:
    for chat in ((), ("--chat",)):
        finished = openzaya("generate", checkpoint, prompt, "--max-tokens", "3", *options, *chat)
        assert finished.code == 0 and finished.err == ""


def test_a_prompt_that_leaves_little_room_ends_at_the_last_position(checkpoint: Path) -> None:
    finished = openzaya("generate", checkpoint, "x" * 1010, "--max-tokens", "100000000", "--temperature", "0")
    assert finished.code == 0


def test_no_tokenizer_beside_the_model(checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    for verb in (("generate", bare, "x"), ("chat", bare), ("eval", bare)):
        assert "no tokenizer.json" in error_line(openzaya(*verb))
    assert openzaya("inspect", bare).code == 0


def test_chat_reads_lines_until_an_empty_one(checkpoint: Path) -> None:
    options = ("--max-tokens", "6", "--temperature", "0", "--system", "Be brief.")
    two = openzaya("chat", checkpoint, *options, stdin=b"Hello\nAgain\n\nnever asked\n")
    one = openzaya("chat", checkpoint, *options, stdin=b"Hello\n")
    assert two.code == one.code == 0 and two.err == ""
    assert two.out.startswith(one.out) and len(two.out) > len(one.out)
    assert openzaya("chat", checkpoint, stdin=b"").out == ""


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("<think>because</think>42", "42"),
        ("<think>it never ends", "..."),
        ("<think>x</think>", "..."),
        ("42", "42"),
        ("a</think>b</think>c", "c"),
    ],
)
def test_chat_keeps_answers_and_drops_reasoning(checkpoint, monkeypatch, answer: str, kept: str) -> None:
    """Reasoning that was cut off must not end the chat."""
    seen: list[list[dict]] = []

    def reply(self, messages, params, *, enable_thinking=True):
        seen.append([dict(message) for message in messages])
        render(messages, self.tokenizer, add_generation_prompt=True)
        yield answer

    monkeypatch.setattr(ChatSession, "reply", reply)
    finished = openzaya("chat", checkpoint, stdin=b"first\nsecond\n")
    assert finished.code == 0 and finished.out == f"{answer}\n{answer}\n"
    assert seen[1] == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": kept},
        {"role": "user", "content": "second"},
    ]


def test_ctrl_c_ends_the_answer_and_not_the_chat(checkpoint: Path, monkeypatch) -> None:
    def reply(self, messages, params, *, enable_thinking=True):
        yield "part"
        if len(messages) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ChatSession, "reply", reply)
    finished = openzaya("chat", checkpoint, stdin=b"first\nsecond\n")
    assert finished.code == 0 and finished.out == "part\npart\n"


def test_ctrl_c_in_generate_is_130(checkpoint: Path, monkeypatch) -> None:
    def go_on(self, text, params):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(ChatSession, "go_on", go_on)
    assert openzaya("generate", checkpoint, "x").code == 130


def test_output_that_cannot_be_shown_does_not_end_the_program(checkpoint: Path) -> None:
    """A terminal of plain ASCII, as under LANG=C."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "openzaya.cli", "generate", str(checkpoint), "x", "--max-tokens", "60"]
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr and done.stdout.isascii() and len(done.stdout) > 10


# --- eval and report ------------------------------------------------------------------------------


def test_eval_prints_a_table_or_one_json_object_and_writes_a_report(checkpoint: Path, tmp_path: Path) -> None:
    settings = ["--k", "2", "--per-cell", "1", "--families", "sorting,largest_run", "--max-tokens", "4"]
    table = openzaya("eval", checkpoint, *settings)
    assert table.code == 0
    assert [line.split()[0] for line in table.out.splitlines()] == ["group", "easy", "hard", "all", "never_trained"]
    finished = openzaya("eval", checkpoint, *settings, "--json", "--out", tmp_path / "e")
    assert finished.code == 0
    result = json.loads(finished.out.strip().splitlines()[-1])
    assert result["model"] == str(checkpoint) and result["k"] == 2
    assert result == json.loads((tmp_path / "e" / "eval.json").read_text())
    assert (tmp_path / "e" / "samples.jsonl").exists() and (tmp_path / "e" / "report.html").exists()
    again = openzaya("report", tmp_path / "e")
    assert again.code == 0
    assert again.out.split() == [str(tmp_path / "e" / "report.html"), str(tmp_path / "e" / "report.md")]


# --- the disk -------------------------------------------------------------------------------------


def test_an_output_directory_that_is_a_file_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    (tmp_path / "stages").mkdir()
    recipe = miniature.write_phase(tmp_path / "stages", steps=1)
    commands = [
        ("init", "smoke", taken, "vocab_size=300", "hidden_size=16"),
        ("convert", checkpoint, taken, "--to", "legacy"),
        ("train", recipe, "--out", taken),
        ("run", tmp_path / "stages", "--out", taken),
        (
            "eval",
            checkpoint,
            *["--k", "1", "--per-cell", "1", "--families", "sorting", "--max-tokens", "1", "--out"],
            taken,
        ),
        ("report", taken),
    ]
    for command in commands:
        line = error_line(openzaya(*command))
        assert str(taken) in line, line
    assert taken.read_text() == "a file"


def test_a_read_only_directory_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write anywhere")
    (tmp_path / "stages").mkdir()
    recipe = miniature.write_phase(tmp_path / "stages", steps=1)
    for command in (
        ("init", "smoke", locked / "x", "vocab_size=300", "hidden_size=16"),
        ("train", recipe, "--out", locked / "x"),
        ("convert", checkpoint, locked / "x", "--to", "legacy"),
    ):
        assert "Permission denied" in error_line(openzaya(*command))


def test_a_disk_that_is_full_is_one_line(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "stages").mkdir()
    recipe = miniature.write_phase(tmp_path / "stages", steps=2)

    def full(value, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    line = error_line(openzaya("train", recipe, "--out", tmp_path / "stages" / "02-pretrain"))
    assert "No space left on device" in line
    status = json.loads((tmp_path / "stages" / "02-pretrain" / "status.json").read_text())
    assert status["state"] == "failed"
    monkeypatch.undo()
    assert openzaya("train", recipe, "--out", tmp_path / "stages" / "02-pretrain").code == 0
