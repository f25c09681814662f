"""Times of day and dates: durations added to a clock, days added to a calendar.

Clock: one line a duration, ``22:50+1:25=0:15``; difficulty d adds d + 1 of them, and one at least carries
an hour, because the careless annotator forgets to. Calendar: one line a month that ends, with the days
that are left, ``31 May 103`` then ``30 June 73``, and last the date; difficulty d passes d + 1 ends of
months (no leap years). The careless annotator gives every month 30 days.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from openzaya.problems.base import Annotator, Family

_MINUTES_A_DAY = 24 * 60
_MONTHS = {
    "January": 31,
    "February": 28,
    "March": 31,
    "April": 30,
    "May": 31,
    "June": 30,
    "July": 31,
    "August": 31,
    "September": 30,
    "October": 31,
    "November": 30,
    "December": 31,
}
_NAMES = tuple(_MONTHS)


def _clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


class Clock(Family):
    """Data: minutes since midnight; durations in minutes."""

    name: ClassVar[str] = "clock"
    title: ClassVar[str] = "time of day"
    habit: ClassVar[str] = "does not carry the hour"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        start = time = 60 * rng.randrange(24) + rng.randint(1, 59)
        durations = []
        for place in range(difficulty + 1):
            minutes = rng.randint(60 - time % 60, 59) if place == 0 else rng.randrange(60)
            durations.append(60 * rng.randrange(10) + minutes)
            time += durations[-1]
        written = "".join(f"+{_clock(duration)}" for duration in durations)
        return f"Time of day: {_clock(start)}{written}", f"{start} {sorted(durations)}", (start, tuple(durations))

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        time, durations = data
        lines = []
        for duration in durations:
            result = time + duration
            if annotator is not None:
                if annotator.habit and time % 60 + duration % 60 >= 60:
                    result -= 60
                result = annotator.number(result)
            result %= _MINUTES_A_DAY
            lines.append(f"{_clock(time)}+{_clock(duration)}={_clock(result)}")
            time = result
        return "\n".join(lines), _clock(time)


class Calendar(Family):
    """Data: day, number of the month from 0, days to add."""

    name: ClassVar[str] = "calendar"
    title: ClassVar[str] = "date after some days"
    habit: ClassVar[str] = "gives every month 30 days"

    def _draw(self, rng: random.Random, difficulty: int) -> tuple[str, str, Sequence[Any]]:
        day, month = rng.randint(1, 28), rng.randrange(12)
        full = sum(_MONTHS[_NAMES[(month + later) % 12]] for later in range(difficulty + 1))
        num_days = full - day + rng.randint(1, 28)
        prompt = f"Date after {num_days} days, no leap year: {day} {_NAMES[month]}"
        return prompt, f"{num_days} {day} {month}", (day, month, num_days)

    def _work(self, data: Sequence[Any], annotator: Annotator | None) -> tuple[str, str]:
        day, month, num_left = data
        lines = []
        while True:
            name = _NAMES[month % 12]
            length = 30 if annotator is not None and annotator.habit else _MONTHS[name]
            if day + num_left <= length:
                break
            num_left -= length - day
            if annotator is not None:
                num_left = max(1, annotator.number(num_left))
            lines.append(f"{length} {name} {num_left}")
            day, month = 0, month + 1
        answer = f"{day + num_left} {name}"
        return "\n".join([*lines, answer]), answer
