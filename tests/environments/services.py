"""What the tests of the worker run in it."""

from __future__ import annotations

import os
import random
import sys
import time


class Service:
    """Well and badly behaved methods."""

    def __init__(self, start: int = 0) -> None:
        self.count = start

    def echo(self, *values: object) -> list[object]:
        return list(values)

    def next(self) -> int:
        self.count += 1
        return self.count

    def pid(self) -> int:
        return os.getpid()

    def hang(self) -> None:
        while True:
            pass

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "awake"

    def die(self) -> None:
        os._exit(3)

    def fail(self) -> None:
        raise ValueError("no such thing")

    def leave(self) -> None:
        sys.exit(0)

    def print(self) -> str:
        print('{"value": "forged"}', flush=True)
        os.write(1, b'{"value": "forged"}\n')
        return "printed"

    def flood(self) -> str:
        return "x" * 5_000_000

    def eat_memory(self) -> int:
        return len(bytearray(64 << 30))

    def no_json(self) -> object:
        return object()

    def recurse(self) -> None:
        self.recurse()

    def reseed(self) -> float:
        random.seed(0)
        return random.random()


class Broken:
    """Cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("not today")
