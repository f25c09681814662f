"""The command line in this process: ``main`` with given arguments and input, and everything it printed."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from openzaya import cli


@dataclass(frozen=True)
class Finished:
    """Exit code and both outputs of a command."""

    code: int
    out: str
    err: str


def openzaya(*arguments: object, stdin: bytes = b"") -> Finished:
    """Run a verb. Anything but SystemExit passes through: a user would see a traceback."""
    out, err = io.StringIO(), io.StringIO()
    given = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    code = 0
    with (
        mock.patch.object(sys, "argv", ["openzaya", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", given),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return Finished(code, out.getvalue(), err.getvalue())


def error_line(finished: Finished) -> str:
    """The one line that an error is, the last one but for its indented parts; fails for anything else."""
    assert finished.code == 1, finished
    lines = [line for line in finished.err.splitlines() if line.strip() and not line.startswith("  ")]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0] and "Traceback" not in finished.err, finished.err
    return errors[0]
