"""What a stage of work leaves behind in its directory while it runs, and what a person sees of it.

    run.json            {"openzaya_run_format": 1}; a reader refuses a newer number
    resolved.toml       every setting of the stage; itself a recipe
    environment.json    Python, torch, processor, threads, commit, arguments; no host or user names
    status.json         {"state": "running" | "done" | "interrupted" | "failed", "step": ..., final numbers}
    metrics.jsonl       one JSON object a line: step, time_unix_s, and the metrics of that step
    tensorboard/        the same numbers as TensorBoard events

``metrics.jsonl`` holds each step once and in order: a stage that continues after step s first removes
what an interrupted process wrote beyond s. A process that is killed may leave a half-written last
line, which every reader skips. Numbers that are not finite are written as null, since JSON has none.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal

from openzaya.errors import DataError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

State = Literal["running", "done", "interrupted", "failed"]
Metric = float | Sequence[float] | Sequence[Sequence[float]]

RUN_FORMAT = 1
PLAIN_LINE_INTERVAL_S = 10.0
LIVE_NUMBERS = {
    "loss/ce_nats": "loss {:.3f} nats",
    "route/load_entropy_min": "load entropy {:.3f}",
    "time/tokens_per_s": "{:,.0f} tokens/s",
}
"""What the display shows of a step's metrics, and how."""


class RunLog:
    """Writes one stage's directory and shows its progress. Use it as a context manager.

    ``total_steps`` is the stage's length; ``resume_step`` the number of steps already done (0 for a
    fresh start): records of later steps, left by a process that was cut off, are removed.
    Leaving the ``with`` block sets the state: done, interrupted (KeyboardInterrupt) or failed.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        total_steps: int,
        resume_step: int = 0,
        phase: str = "train",
        resolved_toml: str | None = None,
        tensorboard: bool = True,
        live_numbers: Mapping[str, str] = LIVE_NUMBERS,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        check_run_format(self.directory)
        self._total_steps = total_steps
        self._step = resume_step
        self._phase = phase
        self._final: dict[str, Any] = {}
        self._closed = False
        self._clock, self._started_s = clock, clock()
        write_json(self.directory / "run.json", {"openzaya_run_format": RUN_FORMAT})
        write_json(self.directory / "environment.json", describe_environment())
        if resolved_toml is not None:
            write_text_atomically(self.directory / "resolved.toml", resolved_toml)
        metrics_path = self.directory / "metrics.jsonl"
        _truncate_metrics(metrics_path, resume_step)
        self._metrics = metrics_path.open("a", encoding="utf-8")
        self._events = _EventFile(self.directory / "tensorboard", resume_step) if tensorboard else None
        self._display = ProgressDisplay(
            phase, total_steps, resume_step, live_numbers=live_numbers, stream=stream or sys.stderr, clock=clock
        )
        self._write_status("running")

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Record ``metrics`` of ``step`` (steps done so far, from 1). Lists hold one entry a layer."""
        if step <= self._step:
            raise ValueError(f"step {step} was logged after step {self._step}; steps must increase")
        self._step = step
        record = {"step": step, "time_unix_s": round(time.time(), 3)}
        # One write per line, flushed: a reader sees whole lines, and a kill loses at most the last.
        self._metrics.write(json.dumps(record | {key: _finite(value) for key, value in metrics.items()}) + "\n")
        self._metrics.flush()
        if self._events is not None:
            self._events.write(step, metrics)
        if self._display.update(step, metrics):
            self._write_status("running")

    def set_final(self, **numbers: Any) -> None:
        """Numbers of the stage as a whole, kept in ``status.json`` beside its state."""
        self._final.update({key: _finite(value) for key, value in numbers.items()})

    def close(self, state: State = "done", *, error: str | None = None) -> None:
        """Finish with ``state``. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if error is not None:
            self._final["error"] = error
        self._display.close()
        self._metrics.close()
        if self._events is not None:
            self._events.close()
        self._write_status(state)

    def _write_status(self, state: State) -> None:
        status = {
            "state": state,
            "phase": self._phase,
            "step": self._step,
            "total_steps": self._total_steps,
            "elapsed_s": round(self._clock() - self._started_s, 1),
            "updated_unix_s": round(time.time(), 3),
        }
        write_json(self.directory / "status.json", status | self._final)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("done")
        elif issubclass(kind, KeyboardInterrupt):
            self.close("interrupted")
        else:
            self.close("failed", error=f"{kind.__name__}: {error}")


# --- reading --------------------------------------------------------------------------------------


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` in order. A half-written last line is left out.

    A missing file, or a malformed line anywhere else, raises :class:`DataError`.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a run that has logged metrics") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            if number == len(lines):  # no newline after it: the writer was stopped there
                break
            raise DataError(
                f"{path}:{number}: not a record of metrics: {line[:60]!r}; remove the line or the file"
            ) from None
        records.append(record)
    return records


def check_run_format(directory: Path) -> None:
    """Refuse a run directory whose format is newer than this program's; a directory without one passes."""
    record = read_json(directory / "run.json")
    found = 0 if record is None else record.get("openzaya_run_format")
    if not isinstance(found, int) or found > RUN_FORMAT:
        raise DataError(
            f"{directory}: run format {found!r}, but this version of OpenZAYA knows formats up to {RUN_FORMAT}; "
            "update OpenZAYA or use another directory"
        )


def read_json(path: Path) -> Any:
    """The JSON in ``path``, or None where there is no such file; malformed JSON raises :class:`DataError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); remove it or restore it") from None


# --- writing --------------------------------------------------------------------------------------


def write_text_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` so that a reader, or a restart after a kill, sees the old or the new whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Like :func:`write_text_atomically`, for a JSON value, indented."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _truncate_metrics(path: Path, last_step: int) -> None:
    if path.exists():
        kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= last_step]
        write_text_atomically(path, "".join(kept))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def describe_environment() -> dict[str, Any]:
    """What decides speed and numbers on this machine. Holds no host, user or home-directory names."""
    return {
        "started_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "packages": {name: _package_version(name) for name in ("openzaya", "torch", "transformers", "numpy")},
        "torch_threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "git_commit": _git_commit(),
        "arguments": [Path(sys.argv[0]).name, *(_without_home(argument) for argument in sys.argv[1:])],
    }


def _without_home(argument: str) -> str:
    home = str(Path.home())
    return argument.replace(home, "~") if len(home) > 1 else argument


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the source tree this package lies in, with ``+changes`` where it differs; None outside one."""
    source = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # The package may be installed inside somebody else's repository: only a tracked file is ours.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", str(source)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


class _EventFile:
    """TensorBoard events, written directly: torch's writer puts the host's name into the file name."""

    def __init__(self, directory: Path, resume_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        directory.mkdir(exist_ok=True)
        path = directory / f"events.out.tfevents.{time.time_ns() // 1000:016d}.openzaya"
        self._writer = RecordWriter(path.open("wb"))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_step:
            # Tells TensorBoard to forget what earlier files hold from this step on.
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def write(self, step: int, metrics: Mapping[str, Metric]) -> None:
        values = []
        for key, value in metrics.items():
            for tag, number in _scalars(key, value):
                values.append(self._summary.Value(tag=tag, simple_value=number))
        self._add(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def _add(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _scalars(key: str, value: Metric) -> list[tuple[str, float]]:
    """One number for a scalar, one a layer for a list; deeper tables have no place in TensorBoard's curves."""
    if isinstance(value, int | float):
        return [(key, float(value))]
    return [(f"{key}/layer_{i:02d}", float(entry)) for i, entry in enumerate(value) if isinstance(entry, int | float)]


# --- display --------------------------------------------------------------------------------------


class ProgressDisplay:
    """A live line on a terminal, else a plain line about every ten seconds; both show rate and ETA."""

    def __init__(
        self,
        phase: str,
        total_steps: int,
        first_step: int,
        *,
        live_numbers: Mapping[str, str] = LIVE_NUMBERS,
        stream: IO[str],
        clock: Callable[[], float],
    ) -> None:
        self._live_numbers = live_numbers
        self._phase, self._total_steps, self._step, self._stream = phase, total_steps, first_step, stream
        self._clock = clock
        self._last_line_s = self._last_step_s = clock()
        self._seconds_per_step: float | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if stream.isatty():
            self._open_live(first_step)

    def update(self, step: int, metrics: Mapping[str, Metric]) -> bool:
        """Show ``metrics`` of ``step``. True about every ten seconds, when a plain line is due."""
        now = self._clock()
        seconds_per_step = (now - self._last_step_s) / (step - self._step)
        # The mean over about the last twenty steps: start-up passes out of it, single stalls do not rule it.
        share = 1.0 if self._seconds_per_step is None else 0.1
        self._seconds_per_step = share * seconds_per_step + (1 - share) * (self._seconds_per_step or 0.0)
        is_due = now - self._last_line_s >= PLAIN_LINE_INTERVAL_S or step >= self._total_steps
        self._step, self._last_step_s = step, now
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, numbers=self._numbers(metrics))
        elif is_due:
            print(f"{self._phase} {step}/{self._total_steps}  {self._numbers(metrics)}", file=self._stream, flush=True)
        if is_due:
            self._last_line_s = now
        return is_due

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _open_live(self, first_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._progress = Progress(*columns, console=Console(file=self._stream), refresh_per_second=4)
        self._task = self._progress.add_task(
            self._phase, total=self._total_steps, completed=first_step, numbers="starting"
        )
        self._progress.start()

    def _numbers(self, metrics: Mapping[str, Metric]) -> str:
        shown = []
        for key, template in self._live_numbers.items():
            value = metrics.get(key)
            if isinstance(value, int | float):
                shown.append(template.format(value))
        seconds_left = (self._seconds_per_step or 0.0) * max(0, self._total_steps - self._step)
        return "  ".join([*shown, f"ETA {format_duration(seconds_left)}"])


def format_duration(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3675`` -> ``1:01:15`` (hours, minutes, seconds)."""
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole_seconds:02d}" if hours else f"{minutes}:{whole_seconds:02d}"
