"""Load on a server: many streaming clients, some of whom leave, and what is left when all have gone.

    python benchmarks/serve_load.py [MODEL] [--clients N] [--minutes M] [--seed S] [--quick] [--json]

Starts ``openzaya serve`` on MODEL (a checkpoint directory; by default a small one with random weights), asks each
of a few dozen questions alone and keeps the tokens, then lets N clients ask them at random over plain HTTP, each with
its own seed and length. A third of the requests are dropped at a random moment, before the first byte or in the
middle of the stream. Every token that arrives is compared with those of the question asked alone.

When the time is over and the server is idle again, four things must hold, or the exit code is 1:

    no stream was lost, mixed up or answered with an error other than 429
    nothing runs or waits, and all blocks of the cache are free (/metrics)
    no request is open in the server
    its resident memory is within 5 % of what it was, idle, after a first short round of the same load

The last line is one JSON object; a run without --quick also writes benchmarks/results/serve_load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
NUM_QUESTIONS = 48
SHARE_DROPPED = 1 / 3
MEMORY_TOLERANCE = 0.05
IDLE_S = 3.0
CACHE_GB = 0.08


@dataclass
class Tally:
    """What the clients saw."""

    finished: int = 0
    dropped: int = 0
    refused: int = 0
    tokens: int = 0
    seconds_to_first: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def write_model(directory: Path) -> Path:
    """A small checkpoint with random weights and a tokenizer."""
    from openzaya.data.tokenizer import train_tokenizer
    from openzaya.model import hf
    from openzaya.model.config import preset
    from openzaya.model.transformer import Zaya

    tokenizer = train_tokenizer(["What is the sum of these numbers, and why is it so?"] * 4, 320)
    config = preset("smoke").with_changes(vocab_size=len(tokenizer), max_position_embeddings=2048)
    hf.save(Zaya(config, seed=0), directory / "random", layout="native", tokenizer=tokenizer)
    return directory / "random"


def start_server(model: Path, log: Any) -> tuple[subprocess.Popen[str], str]:
    """The process, and its address."""
    command = [sys.executable, "-m", "openzaya.cli", "serve", str(model), "--port", "0", "--max-waiting", "4096"]
    # A small cache is used up, and so resident, from the first round on; its rest would be taken little by little.
    command += ["--cache-gb", str(CACHE_GB)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
    assert process.stdout is not None
    match = re.search(r"at (http://\S+)", process.stdout.readline())
    if match is None:
        raise SystemExit(f"the server did not start; its log is {log.name}")
    return process, match[1]


def resident_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


def questions(seed: int) -> list[dict[str, Any]]:
    """Requests with seeds of their own; some share a long beginning, so that the prefix cache takes part."""
    draw = random.Random(seed)
    shared = " ".join(str(draw.randrange(100)) for _ in range(60))
    found = []
    for number in range(NUM_QUESTIONS):
        text = f"{shared if number % 2 else ''} Add: {draw.randrange(100)}+{draw.randrange(100)}"
        found.append(
            {
                "messages": [{"role": "user", "content": text}],
                "seed": 1000 * seed + number,
                "max_tokens": draw.choice((8, 32, 96, 200)),
                "ignore_eos": bool(number % 3),
                "stream": True,
                "return_token_ids": True,
            }
        )
    return found


async def ask(
    client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None, tally: Tally
) -> list[int] | None:
    """The tokens that arrived; None where the queue was full. ``leave_after`` pieces, the connection is dropped."""
    begun_s, tokens, is_whole = time.perf_counter(), [], False
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code == 429:
            tally.refused += 1
            await asyncio.sleep(float(response.headers["retry-after"]) * random.random())
            return None
        if response.status_code != 200:
            tally.faults.append(f"status {response.status_code}: {(await response.aread())[:200]!r}")
            return None
        num_pieces = 0
        async for line in response.aiter_lines():
            if leave_after is not None and num_pieces >= leave_after:
                tally.dropped += 1
                return tokens
            if line == "data: [DONE]":
                is_whole = True
            elif line.startswith("data: "):
                piece = json.loads(line[6:])
                if "error" in piece:
                    tally.faults.append(f"error in a stream: {piece['error']['message']}")
                    return tokens
                ids = piece["choices"][0].get("token_ids", [])
                if ids and not tokens:
                    tally.seconds_to_first.append(time.perf_counter() - begun_s)
                tokens += ids
                num_pieces += 1
    if not is_whole:
        tally.faults.append("a stream ended without [DONE]")
    tally.finished += 1
    return tokens


async def one_client(
    url: str, number: int, bodies: list[dict[str, Any]], alone: list[list[int]], end_s: float
) -> Tally:
    """Ask until the time is over; compare everything that comes back."""
    tally, draw = Tally(), random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(600)) as client:
        while time.perf_counter() < end_s:
            index = draw.randrange(len(bodies))
            leave_after = draw.randrange(bodies[index]["max_tokens"]) if draw.random() < SHARE_DROPPED else None
            if leave_after == 0:
                # Before the first byte: the request may still be in the queue, or not even read.
                with contextlib.suppress(TimeoutError, httpx.HTTPError):
                    await asyncio.wait_for(client.post("/v1/chat/completions", json=bodies[index]), draw.random() / 20)
                tally.dropped += 1
                continue
            try:
                tokens = await ask(client, bodies[index], leave_after, tally)
            except httpx.HTTPError as error:
                tally.faults.append(f"{type(error).__name__}: {error}")
                continue
            if tokens is None:
                continue
            tally.tokens += len(tokens)
            expected = alone[index] if leave_after is None else alone[index][: len(tokens)]
            if tokens != expected:
                tally.faults.append(f"question {index}: {tokens[:10]}... instead of {expected[:10]}...")
    return tally


async def idle_metrics(url: str) -> dict[str, float]:
    """The server's gauges, when nothing runs any more or after ten seconds."""
    async with httpx.AsyncClient(base_url=url) as client:
        for _ in range(50):
            lines = (await client.get("/metrics")).text.splitlines()
            found = {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}
            if found["openzaya_requests_running"] + found["openzaya_requests_waiting"] == 0:
                break
            await asyncio.sleep(0.2)
    await asyncio.sleep(IDLE_S)
    return found


async def load(url: str, clients: int, seconds: float, bodies: list[dict[str, Any]], alone: list[list[int]]) -> Tally:
    end_s = time.perf_counter() + seconds
    tallies = await asyncio.gather(*(one_client(url, number, bodies, alone, end_s) for number in range(clients)))
    total = Tally()
    for tally in tallies:
        total.finished, total.dropped = total.finished + tally.finished, total.dropped + tally.dropped
        total.refused, total.tokens = total.refused + tally.refused, total.tokens + tally.tokens
        total.seconds_to_first += tally.seconds_to_first
        total.faults += tally.faults
    return total


async def measure(url: str, pid: int, arguments: argparse.Namespace) -> dict[str, Any]:
    bodies = questions(arguments.seed)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        alone = [await ask(client, body, None, Tally()) or [] for body in bodies]
    seconds = 60 * arguments.minutes
    await load(url, arguments.clients, max(3.0, min(20.0, seconds / 5)), bodies, alone)
    await idle_metrics(url)
    before = resident_mb(pid)
    begun_s = time.perf_counter()
    total = await load(url, arguments.clients, seconds, bodies, alone)
    took_s = time.perf_counter() - begun_s
    metrics = await idle_metrics(url)
    after = resident_mb(pid)
    problems = list(total.faults)
    if metrics["openzaya_requests_running"] or metrics["openzaya_requests_waiting"]:
        problems.append("requests are left in the engine")
    if metrics["openzaya_cache_blocks_free"] != metrics["openzaya_cache_blocks"]:
        problems.append("blocks of the cache are not free")
    if metrics["openzaya_open_requests"] > 0:
        problems.append("requests are open in the server")
    if after > before * (1 + MEMORY_TOLERANCE):
        problems.append(f"memory grew from {before:.0f} to {after:.0f} MB")
    firsts = sorted(total.seconds_to_first) or [0.0]
    return {
        "clients": arguments.clients,
        "seconds": round(took_s, 1),
        "finished": total.finished,
        "dropped": total.dropped,
        "refused_429": total.refused,
        "tokens_per_second": round(total.tokens / took_s, 1),
        "seconds_to_first_median": round(statistics.median(firsts), 3),
        "seconds_to_first_p99": round(firsts[int(0.99 * (len(firsts) - 1))], 3),
        "resident_mb_before": round(before, 1),
        "resident_mb_after": round(after, 1),
        "problems": problems[:20],
        "num_problems": len(problems),
    }


def circumstances() -> dict[str, Any]:
    """When, what and where."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    facts = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(":", 1)[1].strip() for line in facts if line.startswith("model name")), "")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip(),
        "processor": processor or platform.processor(),
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="20 clients for 10 seconds; writes no file")
    parser.add_argument("--json", action="store_true", help="print the last line only")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clients, arguments.minutes = 20, 1 / 6
    with tempfile.TemporaryDirectory() as directory, open(Path(directory) / "server.log", "w") as log:
        model = arguments.model or write_model(Path(directory))
        process, url = start_server(model, log)
        try:
            result = circumstances() | asyncio.run(measure(url, process.pid, arguments))
            result["model"] = arguments.model and model.name
            process.send_signal(signal.SIGTERM)
            result["exit_code"] = process.wait(60)
        finally:
            process.kill()
    if not arguments.json:
        for name, value in result.items():
            print(f"{name:<26}{value}")
    print(json.dumps(result))
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "serve_load.json").write_text(json.dumps(result, indent=1) + "\n")
    if result["num_problems"] or result["exit_code"]:
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.insert(0, str(ROOT))
    main()
