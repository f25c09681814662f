"""The view: self-contained, safe whatever a model wrote, and, where Chromium is, really drawn."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from openzaya.errors import RSAError
from openzaya.ttc.config import make_config
from openzaya.ttc.journal import Journal
from openzaya.ttc.rsa import markovian_rsa
from openzaya.ttc.view import is_journal, render_view, write_journal_view
from tests.command import error_line, openzaya
from tests.ttc.fake_completer import FakeCompleter, rollout_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & \u2028 <!--"
CONFIG = make_config("default", {"n": 5, "c": 2, "t": 2, "beta": 200, "tau": 30, "final_budget": 200})


def hostile_run(**values: Any) -> dict[str, Any]:
    completer = FakeCompleter(script=lambda call: rollout_of("thought " * 40 + HOSTILE, HOSTILE, call))
    result = asyncio.run(markovian_rsa(HOSTILE, completer, CONFIG, verifier=lambda rollout: 1.0))
    question = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": HOSTILE}]}
    return result.to_dict() | {"run_key": HOSTILE, "question": question, "state": "finished"} | values


def data_of(page: str) -> dict[str, Any]:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(text)


def test_model_text_cannot_leave_its_place() -> None:
    page = render_view([hostile_run()], title=HOSTILE)
    assert page.count("</script>") == 2 and "onerror" in page and "<img" not in page
    text = json.dumps(data_of(page), ensure_ascii=False)
    assert "onerror" in text and data_of(page)["runs"][0]["question"]["messages"][1]["content"] == HOSTILE


def test_nothing_comes_from_elsewhere_and_only_own_scripts_run() -> None:
    page = render_view([hostile_run()])
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none';")
    for tag in ("style", "script"):
        [body] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        banned = (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "fetch(",
            "url(",
            "@import",
        )
        assert not [word for word in banned if word in body]
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page.partition('id="data"')[0])
    assert "__" not in page.partition('id="data"')[0]


def test_odd_values_become_json() -> None:
    run = hostile_run(score=float("nan"))
    run["rounds"][0]["candidates"][0]["correct"] = float("inf")
    run["rounds"][0]["candidates"][0]["answer"] = "half a pair \ud800"
    found = data_of(render_view([run]))["runs"][0]
    assert found["score"] is None and found["rounds"][0]["candidates"][0]["correct"] is None
    assert found["rounds"][0]["candidates"][0]["answer"] == "half a pair ?"


def test_only_the_longest_texts_are_shortened_and_their_ends_are_kept() -> None:
    run = hostile_run()
    candidates = [one for round_ in run["rounds"] for one in round_["candidates"]]
    for one in candidates[:2]:
        one["rollout"]["reasoning"] = "a" * 50_000 + "the end"
    page = render_view([run], max_characters=30_000)
    assert len(page) < 30_000 + len(render_view([])) + 40_000
    found = [one for round_ in data_of(page)["runs"][0]["rounds"] for one in round_["candidates"]]
    shortened = found[0]["rollout"]["reasoning"]
    assert shortened.endswith("the end") and "characters left out" in shortened and len(shortened) < 15_000
    assert [one["rollout"] for one in found[2:]] == json.loads(json.dumps([one["rollout"] for one in candidates[2:]]))


def journal_of(path: Path, name: str = "p") -> Path:
    with Journal.open(path) as journal:
        asyncio.run(markovian_rsa("Why?", FakeCompleter(), CONFIG, journal=journal, run_key=name))
    return path


def test_report_writes_the_view_of_a_journal(tmp_path: Path) -> None:
    journal = journal_of(tmp_path / "runs.sqlite")
    finished = openzaya("report", journal)
    assert finished.code == 0 and finished.out == f"{tmp_path / 'runs.html'}\n" and finished.err == ""
    page = (tmp_path / "runs.html").read_text()
    [run] = data_of(page)["runs"]
    assert run["run_key"] == "p" and len(run["rounds"]) == 3 and data_of(page)["title"] == "runs.sqlite"
    assert write_journal_view(journal, tmp_path / "again.html").read_text() == page


def test_report_of_what_is_no_journal(tmp_path: Path) -> None:
    import sqlite3

    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    assert is_journal(other) and "no RSA journal" in error_line(openzaya("report", other))
    half = tmp_path / "half.sqlite"
    half.write_bytes(journal_of(tmp_path / "whole.sqlite").read_bytes()[:5000])
    assert str(half) in error_line(openzaya("report", half))
    assert not is_journal(tmp_path / "nowhere") and not is_journal(tmp_path)
    with pytest.raises(RSAError):
        write_journal_view(tmp_path / "nowhere")


# --- in a browser -----------------------------------------------------------------------------------

DRIVER = """
const result = { title: document.title, cells: document.querySelectorAll(".cell").length };
location.hash = "run=1";
setTimeout(() => {
  result.cells = document.querySelectorAll(".cell").length;
  result.markup = document.querySelectorAll("main img, main script").length;
  const cell = shown.cells.get("2.1").button;
  cell.focus();
  result.lines = document.querySelectorAll("#lines path:not(.far)").length;
  result.far = document.querySelectorAll("#lines path.far").length;
  cell.click();
  result.detail = at("candidate").hidden ? "" : at("candidate").textContent;
  result.marked = document.querySelector("#candidate mark")?.textContent ?? "";
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  press("ArrowLeft"); press("ArrowDown");
  result.focus = document.activeElement.dataset.key;
  document.activeElement.click();
  result.after = document.querySelectorAll("#lines path.after").length;
  result.marked = document.querySelector("#candidate mark")?.textContent ?? "";
  press("Escape");
  result.hidden = at("candidate").hidden;
  result.rounds = at("rounds-rows").rows.length;
  location.hash = "";
  setTimeout(() => {
    result.rows = at("list-rows").rows.length;
    at("filter").value = "unfinished"; at("filter").dispatchEvent(new Event("input"));
    result.unfinished = at("list-rows").rows.length;
    result.end = document.title;
    const pre = document.createElement("pre");
    pre.id = "result"; pre.textContent = JSON.stringify(result);
    document.body.append(pre);
  }, 50);
}, 50);
"""


def drawn(page: str, folder: Path) -> str:
    """The document after its scripts ran."""
    file = folder / "page.html"
    file.write_text(page)
    arguments = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    arguments += ["--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=environment)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_chromium_under_its_own_policy(tmp_path: Path) -> None:
    document = drawn(render_view([hostile_run()], title="One run"), tmp_path)
    assert document.count('class="cell done') == 15 and "<title>One run</title>" in document
    assert "flex-grow" in document, "the policy lets the page style its bars"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_chromium(tmp_path: Path) -> None:
    unfinished = hostile_run(state="unfinished", answer=None, selected=[], score=None)
    unfinished["rounds"] = unfinished["rounds"][:1]
    page = render_view([unfinished, hostile_run()], title="Runs")
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    document = drawn(page.replace("</body>", f"<script>{DRIVER}</script></body>"), tmp_path)
    [text] = re.findall(r'<pre id="result">(.*?)</pre>', document, flags=re.DOTALL)
    result = json.loads(html.unescape(text))
    assert result["cells"] == 15 and result["markup"] == 0 and result["end"] == "Runs"
    assert result["lines"] >= 2 and result["far"] >= 2, "its parents, and theirs"
    assert "Round 2, candidate 1" in result["detail"] and HOSTILE.split()[0] in result["detail"]
    assert result["focus"] == "1.2" and result["hidden"] is True and result["rounds"] == 4
    assert result["marked"].endswith("<!--") and len(result["marked"].split()) == 30
    assert result["rows"] == 2 and result["unfinished"] == 1
