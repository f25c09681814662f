"""Hours of mixed use of the RSA proxy, and what is left when nobody uses it any more.

    python benchmarks/rsa_soak.py [MODEL] [--minutes M] [--clients N] [--seed S] [--quick] [--json]

Two proxies (``openzaya serve --proxy``) run side by side: one in front of a scripted endpoint, which fails 5 % of its
calls, lets 1 % hang, and is killed and started again several times; one in front of ``openzaya serve MODEL`` (by
default a small model with random weights). Clients of both draw at random among

    RSA requests, streamed and whole          plain requests that are passed on, streamed and whole
    clients that leave at a random moment     requests with the same seed as one that was left: they go on from it
    broken requests                           /tokenize, /v1/models

Every ten seconds the proxies' resident memory, open files, threads, tasks of the event loop and connections to the
upstream are read. After a first part of the same load, and at the end, the proxies are idle for a while; in between
nothing may have grown, or the exit code is 1:

    tasks, jobs, open requests                the same numbers
    open files, connections, threads          within TOLERANCES: pools keep a few connections open, and the event
                                              loop's threads, of which it has at most six, begin when needed
    resident memory                           at most MEMORY_TOLERANCE more

The last line is one JSON object; a run without --quick also writes benchmarks/results/rsa_soak.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serve_load import circumstances, resident_mb, write_model  # noqa: E402

RESULTS = Path(__file__).parent / "results"
CHAT = "/v1/chat/completions"
SAMPLE_S = 10.0
IDLE_S = 8.0
"""Longer than idle connections are kept by the HTTP client."""
MEMORY_TOLERANCE = 0.10
TOLERANCES = {"tasks": 0, "jobs": 0, "open_requests": 0, "threads": 6, "files": 8, "upstream_connections": 8}
"""How many more there may be."""
PAUSE_S = 1.0
"""Longest pause of a client between two requests."""
TIMEOUTS_S = {"scripted": "8", "engine": "60"}
"""Of one call; calls that hang are tried again after it."""
EXPECTED = (408, 429, 502, 503, 504)
"""What an upstream that fails, hangs or is away may lead to, besides its own 500s."""
FAULTS = ("--fail", "0.05", "--hang", "0.01", "--latency-s", "0.02")
QUESTIONS = ("What is 17 + 25?", "Sort: 3 1 2", "How many a's are in banana?", "Zähle bis drei.", "一加一是多少?")
BROKEN: tuple[tuple[str, bytes, int], ...] = (
    ("not JSON", b'{"messages": [', 400),
    ("unknown setting", b'{"messages": [{"role": "user", "content": "x"}], "rsa": {"width": 4}}', 400),
    ("unknown preset", b'{"messages": [{"role": "user", "content": "x"}], "rsa": "best"}', 400),
    ("too much", b'{"messages": [{"role": "user", "content": "x"}], "rsa": {"n": 4000, "t": 60}}', 400),
    ("no question", b'{"messages": [{"role": "system", "content": "x"}], "rsa": true}', 400),
    ("wrong type", b'{"messages": "hello", "rsa": true}', 400),
    ("unknown model", b'{"model": "x", "messages": [{"role": "user", "content": "x"}], "rsa": true}', 404),
)


@dataclass
class Side:
    """A proxy, its upstream, and what was seen of them."""

    name: str
    url: str
    pid: int
    upstream_port: int
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)
    left_seeds: list[int] = field(default_factory=list)
    allows_upstream_errors: bool = False

    def fault(self, what: str, *, relayed: bool = False) -> None:
        """Record what should not be; ``relayed``: to a plain request, which gets broken answers as they are."""
        if relayed and self.allows_upstream_errors:
            self.counts["broken by the endpoint"] += 1
            return
        self.counts["faults"] += 1
        if len(self.faults) < 20:
            self.faults.append(what)


# --- processes ----------------------------------------------------------------------------------------


def start(command: list[str], log: Any, pattern: str) -> tuple[subprocess.Popen[str], str]:
    """A process, and what the first line of its output says at ``pattern``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.search(pattern, line)
    if match is None:
        process.kill()
        raise SystemExit(f"{' '.join(command)} did not start; its log is {log.name}")
    return process, match[1]


def start_scripted(port: int, log: Any) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "tests.ttc.scripted_endpoint", "--port", str(port), *FAULTS]
    return start(command, log, r'"url": "(http://[^"]+)"')


def start_server(arguments: list[str], log: Any) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "openzaya.cli", "serve", *arguments, "--port", "0"]
    return start(command, log, r"at (http://\S+)")


def proxy_arguments(upstream: str, directory: Path, name: str) -> list[str]:
    journal = directory / f"{name}.sqlite"
    return [
        "--proxy",
        upstream,
        "--request-timeout",
        TIMEOUTS_S[name],
        "--rsa-timeout",
        "170",
        "--rsa-journal",
        str(journal),
    ]


# --- what a process holds -----------------------------------------------------------------------------


def connections(pid: int, port: int) -> int:
    """TCP connections of the machine to ``port`` that process ``pid`` holds open."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor))
            if match:
                sockets.add(match[1])
    held = 0
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        columns = line.split()
        held += int(columns[2].rpartition(":")[2], 16) == port and columns[9] in sockets
    return held


async def sample(side: Side) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=side.url, timeout=30) as client:
        lines = (await client.get("/metrics")).text.splitlines()
    metrics = {line.split()[0]: float(line.split()[1]) for line in lines if line and not line.startswith("#")}
    status = Path(f"/proc/{side.pid}/status").read_text()
    return {
        "resident_mb": round(resident_mb(side.pid), 2),
        "files": len(list(Path(f"/proc/{side.pid}/fd").iterdir())),
        "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),  # type: ignore[index]
        "tasks": metrics["openzaya_tasks"],
        "jobs": metrics["openzaya_jobs"],
        "open_requests": metrics["openzaya_open_requests"],
        "upstream_connections": connections(side.pid, side.upstream_port),
    }


async def idle(side: Side) -> dict[str, float]:
    """What the proxy holds when nobody has asked anything for a while."""
    for _ in range(300):
        if (await sample(side))["jobs"] == 0:
            break
        await asyncio.sleep(0.2)
    await asyncio.sleep(IDLE_S)
    # The HTTP client lets go of its old connections when it makes the next request.
    async with httpx.AsyncClient(base_url=side.url, timeout=60) as client:
        await client.get("/v1/models")
        await client.post(CHAT, json=rsa_body(random.Random(0), seed=0))
    await asyncio.sleep(1.0)
    return await sample(side)


# --- requests -----------------------------------------------------------------------------------------


def rsa_body(draw: random.Random, *, seed: int | None = None, stream: bool = False) -> dict[str, Any]:
    wish: Any = {"n": draw.randint(2, 4), "c": 2, "t": draw.randint(0, 2), "beta": 48, "tau": 16, "final_budget": 96}
    wish |= {"select": draw.choice(("majority", "all", "random", "aggregate"))} if seed is None else {}
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": QUESTIONS[(seed or draw.randrange(99)) % len(QUESTIONS)]}],
        "rsa": wish if seed is None else {"n": 4, "c": 2, "t": 2, "beta": 48, "tau": 16, "final_budget": 96},
        "seed": draw.randrange(2**31) if seed is None else seed,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True, "include_rsa": draw.random() < 0.5}
    return body


def plain_body(draw: random.Random, *, stream: bool) -> dict[str, Any]:
    message = {"role": "user", "content": draw.choice(QUESTIONS)}
    return {"messages": [message], "max_tokens": draw.randint(8, 64), "stream": stream}


async def whole(side: Side, client: httpx.AsyncClient, kind: str, body: dict[str, Any]) -> None:
    response = await client.post(CHAT, json=body)
    side.counts[f"{kind} {response.status_code}"] += 1
    answer = response.json()
    if response.status_code == 200:
        if not answer["choices"] or (body.get("rsa") and "rounds" not in answer["rsa"]):
            side.fault(f"{kind}: {str(answer)[:200]}", relayed="rsa" not in body)
        return
    # The scripted endpoint fails plain requests with 500, and that is passed on.
    is_expected = response.status_code in EXPECTED or (side.allows_upstream_errors and kind.startswith("plain"))
    if not is_expected or not answer["error"]["message"]:
        side.fault(f"{kind}: {response.status_code} {response.text[:200]}")


async def streamed(side: Side, client: httpx.AsyncClient, kind: str, body: dict[str, Any]) -> None:
    last = ""
    async with client.stream("POST", CHAT, json=body) as response:
        side.counts[f"{kind} {response.status_code}"] += 1
        if response.status_code != 200:
            await response.aread()
            if not side.allows_upstream_errors and response.status_code not in EXPECTED:
                side.fault(f"{kind}: {response.status_code} {response.text[:200]}")
            return
        is_events = "event-stream" in response.headers["content-type"]
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    side.counts[f"{kind} error event"] += 1
            last = line or last
    if is_events and last != "data: [DONE]":
        side.fault(f"{kind}: a stream ended with {last[:80]!r}")


async def left(side: Side, client: httpx.AsyncClient, draw: random.Random, *, is_rsa: bool) -> None:
    """A client that goes away, before its answer begins or in the middle of it."""
    stream = draw.random() < 0.6
    seed = draw.randrange(2**31)
    body = rsa_body(draw, seed=seed, stream=stream) if is_rsa else plain_body(draw, stream=stream)
    side.counts["left rsa" if is_rsa else "left plain"] += 1
    work = streamed(side, client, "left", body) if stream else whole(side, client, "left", body)
    with contextlib.suppress(TimeoutError, httpx.HTTPError):
        await asyncio.wait_for(work, draw.random() * 0.6)
    if is_rsa:
        side.left_seeds = [*side.left_seeds[-20:], seed]


async def broken(side: Side, client: httpx.AsyncClient, draw: random.Random) -> None:
    name, content, status = draw.choice(BROKEN)
    response = await client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    side.counts[f"broken {response.status_code}"] += 1
    if response.status_code != status and response.status_code != 502:
        side.fault(f"broken ({name}): {response.status_code} {response.text[:200]}")


KINDS = {
    "rsa": 20,
    "rsa stream": 22,
    "plain": 14,
    "plain stream": 14,
    "left rsa": 10,
    "left plain": 4,
    "again": 6,
    "broken": 7,
    "other": 3,
}
"""What clients ask, and how often."""


async def one_request(side: Side, client: httpx.AsyncClient, draw: random.Random, kind: str) -> None:
    if kind.startswith(("rsa", "plain")):
        stream = kind.endswith("stream")
        body = (rsa_body if kind.startswith("rsa") else plain_body)(draw, stream=stream)
        await (streamed if stream else whole)(side, client, kind, body)
    elif kind.startswith("left"):
        await left(side, client, draw, is_rsa=kind == "left rsa")
    elif kind == "again":
        seed = draw.choice(side.left_seeds) if side.left_seeds else 0
        response = await client.post(CHAT, json=rsa_body(draw, seed=seed))
        side.counts[f"again {response.status_code}"] += 1
        if response.status_code == 200:
            rounds = response.json()["rsa"]["rounds"]
            side.counts["resumed rollouts"] += sum(one["resumed"] for one in rounds)
    elif kind == "broken":
        await broken(side, client, draw)
    else:
        await client.post("/tokenize", json={"prompt": draw.choice(QUESTIONS)})
        await client.get("/v1/models")
        side.counts["other"] += 1


async def one_client(side: Side, number: int, seed: int, end_s: float) -> None:
    draw = random.Random(f"{side.name} {number} {seed}")
    while time.monotonic() < end_s:
        # Now and then a new connection, as new users bring.
        async with httpx.AsyncClient(base_url=side.url, timeout=180) as client:
            for _ in range(20):
                if time.monotonic() >= end_s:
                    return
                kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
                try:
                    await one_request(side, client, draw, kind)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    is_relayed = kind.startswith("plain") or kind == "left plain"
                    side.fault(f"{kind}: {type(error).__name__}: {error}", relayed=is_relayed)
                await asyncio.sleep(draw.random() * PAUSE_S)


async def watch(sides: list[Side], end_s: float) -> None:
    while time.monotonic() < end_s:
        for side in sides:
            side.samples.append(await sample(side))
        await asyncio.sleep(min(SAMPLE_S, max(0.1, end_s - time.monotonic())))


async def load(sides: list[Side], seed: int, clients: int, seconds: float, restart: Any, num_restarts: int) -> None:
    end_s = time.monotonic() + seconds

    async def restarts() -> None:
        for _ in range(num_restarts):
            await asyncio.sleep(seconds / (num_restarts + 1))
            await restart()

    users = [one_client(side, number, seed, end_s) for side in sides for number in range(clients)]
    await asyncio.gather(*users, watch(sides, end_s), restarts())


# --- judging ------------------------------------------------------------------------------------------


def judge(side: Side, before: dict[str, float], after: dict[str, float]) -> list[str]:
    problems = list(side.faults)
    for name, tolerance in TOLERANCES.items():
        if after[name] > before[name] + tolerance:
            problems.append(f"{name} grew from {before[name]:g} to {after[name]:g}")
    if after["resident_mb"] > before["resident_mb"] * (1 + MEMORY_TOLERANCE):
        problems.append(f"resident memory grew from {before['resident_mb']} to {after['resident_mb']} MB")
    return [f"{side.name}: {problem}" for problem in problems]


def growth(samples: list[dict[str, float]]) -> float:
    """Slope of the resident memory over the second half of the samples, in MB an hour."""
    half = samples[len(samples) // 2 :]
    if len(half) < 3:
        return 0.0
    times = [i * SAMPLE_S / 3600 for i in range(len(half))]
    values = [one["resident_mb"] for one in half]
    mean_t, mean_v = sum(times) / len(times), sum(values) / len(values)
    spread = sum((t - mean_t) ** 2 for t in times)
    return sum((t - mean_t) * (v - mean_v) for t, v in zip(times, values, strict=True)) / spread


async def measure(sides: list[Side], arguments: argparse.Namespace, restart: Any) -> dict[str, Any]:
    seconds = 60 * arguments.minutes
    warm_up_s = max(10.0, min(300.0, seconds / 6))
    await load(sides, arguments.seed, arguments.clients, warm_up_s, restart, 1)
    before = [await idle(side) for side in sides]
    for side in sides:
        side.samples.clear()
    begun_s = time.monotonic()
    await load(sides, arguments.seed + 1, arguments.clients, seconds, restart, max(1, int(arguments.minutes / 8)))
    took_s = time.monotonic() - begun_s
    after = [await idle(side) for side in sides]
    problems, results = [], {}
    for side, first, last in zip(sides, before, after, strict=True):
        problems += judge(side, first, last)
        results[side.name] = {
            "idle_before": first,
            "idle_after": last,
            "highest": {name: max(one[name] for one in side.samples) for name in first},
            "memory_growth_mb_per_hour": round(growth(side.samples), 2),
            "requests": dict(sorted(side.counts.items())),
        }
    return {"seconds": round(took_s), "clients": arguments.clients, "sides": results} | {
        "tolerance": {"resident_memory_share": MEMORY_TOLERANCE} | TOLERANCES,
        "problems": problems[:20],
        "num_problems": len(problems),
    }


def run(arguments: argparse.Namespace, directory: Path, log: Any) -> dict[str, Any]:
    processes: dict[str, subprocess.Popen[str]] = {}

    async def restart() -> None:
        """The scripted endpoint is killed, is away for a moment, and comes back at the same port."""
        processes["scripted"].kill()
        processes["scripted"].wait()
        await asyncio.sleep(2.0)
        processes["scripted"], _ = await asyncio.to_thread(start_scripted, port, log)

    try:
        processes["scripted"], scripted = start_scripted(0, log)
        port = int(scripted.rpartition(":")[2])
        model = arguments.model or write_model(directory)
        processes["engine"], engine = start_server([str(model), "--cache-gb", "0.08"], log)
        sides = []
        for name, upstream in (("scripted", scripted), ("engine", engine)):
            process, url = start_server(proxy_arguments(upstream, directory, name), log)
            processes[f"proxy {name}"] = process
            sides.append(Side(name, url, process.pid, int(upstream.rpartition(":")[2])))
        sides[0].allows_upstream_errors = True
        result = circumstances() | asyncio.run(measure(sides, arguments, restart))
        codes = []
        for side in sides:
            processes[f"proxy {side.name}"].send_signal(signal.SIGTERM)
            codes.append(processes[f"proxy {side.name}"].wait(60))
        return result | {"model": arguments.model and arguments.model.name, "exit_codes": codes}
    finally:
        for process in processes.values():
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--clients", type=int, default=2, help="of each proxy")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="where the processes' logs go")
    parser.add_argument("--quick", action="store_true", help="half a minute; writes no file")
    parser.add_argument("--json", action="store_true", help="print the last line only")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.minutes = 0.5
    with tempfile.TemporaryDirectory() as name, open(arguments.log or Path(name) / "servers.log", "w") as log:
        result = run(arguments, Path(name), log)
    if not arguments.json:
        print(json.dumps(result, indent=1))
    print(json.dumps(result))
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "rsa_soak.json").write_text(json.dumps(result, indent=1) + "\n")
    if result["num_problems"] or any(result["exit_codes"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
