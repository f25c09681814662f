"""The chat page: it stays self-contained, asks only for what the server has, and, where Chromium is, really works."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from openzaya.serve.page import RSA_MARK, load_page, page_policy
from openzaya.ttc.config import PRESETS, RSAConfig

PAGE = load_page() or ""
SCRIPT = re.findall(r"<script>(.*?)</script>", PAGE, flags=re.DOTALL)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


def tags() -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(PAGE)
    return parser.tags


def test_nothing_comes_from_elsewhere() -> None:
    assert "//" not in re.sub(r"^\s*//.*$|\s// .*$", "", PAGE, flags=re.MULTILINE), "no URL with a host"
    for tag, attributes in tags():
        assert tag not in ("iframe", "object", "embed", "img", "base"), tag
        for name in ("src", "href", "action"):
            assert attributes.get(name, "data:,") == "data:,", (tag, attributes)
    assert "@import" not in PAGE and "url(" not in PAGE


def test_a_strict_policy_suffices() -> None:
    assert len(SCRIPT) == 1
    assert not [attributes for _, attributes in tags() if "style" in attributes]
    assert not [name for _, attributes in tags() for name in attributes if name.startswith("on")]
    for banned in (
        "eval(",
        "new Function",
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        ".onclick",
    ):
        assert banned not in PAGE, banned
    assert "localStorage" not in re.findall(r"keep\([^)]*key[^)]*\)", PAGE)[0], "the key goes with the tab"


def test_only_endpoints_of_the_server_are_asked() -> None:
    asked = set(re.findall(r'fetch\("([^"]+)"', PAGE))
    assert asked == {"v1/models", "v1/chat/completions"} and PAGE.count("fetch(") == len(asked)


def test_what_the_page_sends_is_what_the_server_knows() -> None:
    schemas = pytest.importorskip("openzaya.serve.schemas")
    body = re.search(r"function requestBody\(\).*?\n}\n", PAGE, flags=re.DOTALL)
    assert body is not None
    returned = body[0].partition("return {")[2]
    sent = {name for name in re.findall(r"([a-z_]+): ", returned) if name not in ("role", "content")}
    sent -= schemas.StreamOptions.model_fields.keys()
    assert sent >= {"messages", "stream", "thinking_budget", "enable_thinking", "max_tokens"}
    assert sent <= schemas.ChatRequest.model_fields.keys()


def test_the_settings_of_a_run_are_those_that_rsa_has() -> None:
    assert RSA_MARK not in PAGE and "class RunTree" in SCRIPT[0]
    menu = re.search(r'<select id="rsa_preset">(.*?)</select>', PAGE, flags=re.DOTALL)
    assert menu is not None and set(re.findall(r"<option>(.*?)</option>", menu[1])) <= PRESETS.keys()
    [numbers] = re.findall(r"RSA_NUMBERS = (\[.*?\])", PAGE)
    assert set(json.loads(numbers)) <= RSAConfig.model_fields.keys()
    assert all(f'id="rsa_{name}"' in PAGE and f'"rsa_{name}"' in PAGE for name in json.loads(numbers))


def test_labels_and_language() -> None:
    found = tags()
    labelled = {attributes.get("for") for tag, attributes in found if tag == "label"}
    assert ("html", {"lang": "en"}) in found and any(attributes.get("name") == "viewport" for _, attributes in found)
    inside_labels = re.findall(r"<label>.*?</label>", PAGE, flags=re.DOTALL)
    for tag, attributes in found:
        if tag in ("input", "textarea", "select"):
            identity = attributes["id"]
            assert (
                identity in labelled
                or "aria-label" in attributes
                or any(f'id="{identity}"' in label for label in inside_labels)
            ), identity


# --- in a browser -----------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</" + "script>"
REASONING = ["First ", "think. "]
ANSWER = ["Here:\n\n``", "`python\nprint('<b>')\n``", "`\nDone. `x` ", HOSTILE]

DONE = {"event": "candidate", "status": "done", "tokens": 10, "seconds": 0.5, "finish_reason": "stop", "parents": []}
ROUND = {"event": "round", "done": 2, "tokens": 20, "seconds": 0.7}
RUN: list[dict[str, Any]] = [
    {"event": "started", "widths": [2, 2], "config": {}, "warnings": ["budgets are scaled"]},
    {"event": "launched", "round": 0, "slot": 0, "parents": []},
    DONE | {"round": 0, "slot": 1, "answer": "42"},
    {"event": "candidate", "round": 0, "slot": 0, "parents": [], "status": "failed", "answer": None, "error": "no"},
    ROUND | {"round": 0, "slots": {"1": "42"}, "answers": {"42": 1}, "done": 1},
    DONE | {"round": 1, "slot": 0, "parents": [0, 1], "answer": "42.0", "finish_reason": "length"},
    DONE | {"round": 1, "slot": 1, "parents": [1], "answer": HOSTILE, "content": HOSTILE, "reasoning": "so"},
    ROUND | {"round": 1, "slots": {"0": "42", "1": HOSTILE}, "answers": {"42": 1, HOSTILE: 1}},
    {"event": "selected", "slots": [0]},
    {"event": "finished", "tokens": 40, "seconds": 1.5, "stopped_early": None, "deviations": ["quorum"]},
]

DRIVER = """
(async () => {
  const until = async (ready) => { while (!ready()) await new Promise((wake) => setTimeout(wake, 20)); };
  const say = (text) => {
    at("prompt").value = text;
    at("prompt").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true }));
  };
  const idle = () => running === null && document.querySelectorAll(".turn.assistant .facts button").length > 0;
  await until(() => at("model").options.length === 2);
  at("seed").value = "7"; at("key").value = "secret"; saveSettings();
  say("one");
  await until(idle);
  const result = {
    answer: document.querySelector(".answer").textContent, code: document.querySelector(".answer pre").textContent,
    markup: document.querySelectorAll(".answer img, .answer script, .answer b").length,
    reasoning: document.querySelector(".reasoning").textContent, open: document.querySelector("details").open,
    facts: document.querySelector(".facts").textContent,
  };
  [...document.querySelectorAll("button")].find((one) => one.textContent === "Regenerate").click();
  await until(idle);
  result.turns = document.querySelectorAll(".turn").length;
  say("forever");
  await until(() => messages.at(-1).content.length > 5);
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  await until(() => running === null);
  result.stopped = [...document.querySelectorAll(".facts")].at(-1).textContent;
  at("rsa_preset").value = "light"; at("rsa_n").value = "2"; showRsaFields(); saveSettings();
  result.fields = !at("rsa-numbers").hidden;
  say("run");
  await until(() => running === null && document.querySelector(".run"));
  const cells = [...document.querySelectorAll(".cell")];
  result.cells = cells.map((cell) => cell.textContent); result.classes = cells.map((cell) => cell.dataset.class);
  result.counters = [...document.querySelectorAll(".counter")].map((one) => one.textContent);
  result.bars = document.querySelectorAll(".stack div").length;
  result.run = document.querySelector(".run .run-status").textContent;
  result.warning = document.querySelector(".run .warning").textContent;
  cells[2].dispatchEvent(new MouseEvent("mouseenter"));
  result.lines = document.querySelectorAll(".lines path").length;
  result.near = document.querySelectorAll(".cell.near").length;
  cells[3].click();
  result.detail = document.querySelector(".candidate").textContent;
  result.runMarkup = document.querySelectorAll(".run img, .run script").length;
  result.runAnswer = [...document.querySelectorAll(".answer")].at(-1).textContent;
  cells[3].click();
  result.closed = document.querySelector(".candidate").hidden;
  at("rsa_preset").value = ""; showRsaFields(); saveSettings();
  say("broken");
  await until(() => document.querySelector(".error"));
  result.error = document.querySelector(".error").textContent;
  say("denied");
  await until(() => at("settings").open);
  result.focus = document.activeElement.id;
  result.title = document.title;
  result.key = sessionStorage.getItem("openzaya.key"); result.local = { ...localStorage };
  await fetch("result", { method: "POST", body: JSON.stringify(result) });
})();
"""


@dataclass
class Seen:
    """What a browser did to the server."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    keys: set[str | None] = field(default_factory=set)
    result: dict[str, Any] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)
    client_left: threading.Event = field(default_factory=threading.Event)


def handler(seen: Seen, page: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def reply(self, status: int, content: bytes, kind: str, **more: str) -> None:
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": str(len(content))} | more
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            seen.paths.add(self.path)
            if self.path == "/":
                self.reply(200, page.encode(), "text/html", Content_Security_Policy=page_policy(page))
            elif self.path == "/v1/models":
                self.reply(200, b'{"data": [{"id": "first"}, {"id": "second"}]}', "application/json")
            else:
                self.reply(404, b"", "text/plain")

        def do_POST(self) -> None:
            seen.paths.add(self.path)
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/result":
                seen.result = body
                seen.done.set()
                self.reply(200, b"", "text/plain")
                return
            seen.bodies.append(body)
            seen.keys.add(self.headers["Authorization"])
            last = body["messages"][-1]["content"]
            if last == "denied":
                self.reply(401, b'{"error": {"message": "wrong key"}}', "application/json")
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                self.stream(last)
            except OSError:
                seen.client_left.set()

        def stream(self, last: str) -> None:
            self.wfile.write(b": still working\n\n")
            self.delta(role="assistant", content="")
            if last == "broken":
                self.event({"error": {"message": "out of order"}})
                return
            for data in RUN if last == "run" else ():
                delta = {"reasoning_content": "a line\n"} if data["event"] == "candidate" else {}
                self.event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "rsa": data})
            while last == "forever":
                self.delta(content="on and on ")
                seen.client_left.wait(0.01)
            for text in REASONING:
                self.delta(reasoning_content=text, reasoning=text)
            for text in ANSWER:
                self.delta(content=text)
            self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
            details = {
                "completion_tokens_details": {"reasoning_tokens": 5},
                "prompt_tokens_details": {"cached_tokens": 8},
            }
            self.event({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 34, **details}})
            self.wfile.write(b"data: [DONE]\n\n")

        def delta(self, **delta: str) -> None:
            self.event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

        def event(self, data: Any) -> None:
            self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
            self.wfile.flush()

    return Handler


@pytest.fixture
def seen() -> Iterator[tuple[Seen, str]]:
    found = Seen()
    page = PAGE.replace("</body>", f"<script>{DRIVER}</script>\n</body>")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found, page))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found, f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()
    thread.join()


def check_run(result: dict[str, Any], body: dict[str, Any]) -> None:
    assert body["rsa"] == {"preset": "light", "n": 2} and "thinking_budget" not in body
    assert body["stream_options"] == {"include_usage": True, "include_rsa": True} and result["fields"]
    assert result["cells"][:3] == ["0 failed", "1 42", "0 42 ✂ ★"] and result["cells"][3].startswith("1 <img src=x")
    assert result["classes"] == ["none", "0", "0", result["classes"][3]] and result["classes"][3] not in ("0", "none")
    assert result["counters"] == ["1/2, 20 tokens, 0.7 s", "2/2, 20 tokens, 0.7 s"] and result["bars"] == 3
    assert result["warning"] == "budgets are scaled"
    assert result["run"] == "Markovian RSA: 40 tokens in 1.5 s · deviation: quorum"
    assert result["lines"] == 2 and result["near"] == 3, "to both parents"
    assert HOSTILE in result["detail"] and "read the tails of 1" in result["detail"] and result["runMarkup"] == 0
    assert result["closed"] and result["runAnswer"].startswith("Here:")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_chromium(seen: tuple[Seen, str], tmp_path: Path) -> None:
    found, address = seen
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--remote-debugging-port=0",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ, "HOME": str(tmp_path)}}
    browser = subprocess.Popen([str(CHROMIUM), *arguments, address], **quiet)  # type: ignore[call-overload]
    try:
        assert found.done.wait(60), f"the page did not come to an end; it asked for {found.paths}"
    finally:
        browser.terminate()
        browser.wait(30)
    result = found.result
    assert result["answer"] == "Here:print('<b>')Done. x " + HOSTILE
    assert result["code"] == "print('<b>')" and result["markup"] == 0 and result["title"] == "OpenZAYA"
    assert result["reasoning"] == "First think. " and result["open"] is False
    assert result["facts"].startswith("34 tokens · ") and "tokens/s" in result["facts"]
    assert "prompt 12 (8 cached)" in result["facts"] and "cut off" in result["facts"]
    assert result["turns"] == 2
    assert "stopped" in result["stopped"] and found.client_left.wait(10), "stopping ends the request"
    assert result["error"] == "out of order" and result["focus"] == "key"
    assert result["key"] == "secret" and "secret" not in json.dumps(result["local"])
    assert found.keys == {"Bearer secret"}
    check_run(result, next(body for body in found.bodies if body["messages"][-1]["content"] == "run"))
    assert found.paths == {"/", "/v1/models", "/v1/chat/completions", "/result"}
    first = found.bodies[0]
    assert (
        first["messages"] == [{"role": "user", "content": "one"}] and first["seed"] == 7 and first["model"] == "first"
    )
    assert found.bodies[1] == first, "regenerated from the same messages"
    roles = [message["role"] for message in found.bodies[-1]["messages"]]
    assert roles == [*["user", "assistant"] * 3, "user", "user"], "no empty answer is sent again"
    assert "First think" not in json.dumps(found.bodies), "reasoning is not sent again"
