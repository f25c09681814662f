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

PAGE_PATH = Path(__file__).parents[2] / "openzaya" / "serve" / "page.html"
PAGE = PAGE_PATH.read_text(encoding="utf-8")
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
    sent = {name for name in re.findall(r"([a-z_]+): ", returned) if name not in ("role", "content", "include_usage")}
    assert sent >= {"messages", "stream", "thinking_budget", "enable_thinking", "max_tokens"}
    assert sent <= schemas.ChatRequest.model_fields.keys()


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
    from openzaya.serve.server import page_policy

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
    assert found.paths == {"/", "/v1/models", "/v1/chat/completions", "/result"}
    first = found.bodies[0]
    assert (
        first["messages"] == [{"role": "user", "content": "one"}] and first["seed"] == 7 and first["model"] == "first"
    )
    assert found.bodies[1] == first, "regenerated from the same messages"
    roles = [message["role"] for message in found.bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user", "user"], "no empty answer is sent again"
    assert "First think" not in json.dumps(found.bodies), "reasoning is not sent again"
