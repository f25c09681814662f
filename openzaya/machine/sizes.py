"""Numbers with units, read and written: 32k tokens, 4.8 GB, 3 minutes."""

from __future__ import annotations

import re

from openzaya.errors import ConfigError

_TOKENS = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([km]?)", re.IGNORECASE)
_FACTORS = {"": 1, "k": 1024, "m": 1024**2}


def parse_tokens(text: str) -> int:
    """A number of tokens: "131072", "131_072", "32k" or "0.5M", where k is 1,024 and M is 1,024 k.

    Raises:
        ConfigError: anything else, less than one, or no whole number.
    """
    match = _TOKENS.fullmatch(text.strip())
    number = float(match[1].replace("_", "")) * _FACTORS[match[2].lower()] if match else 0.0
    if not 1 <= number <= 1 << 40 or number != int(number):
        raise ConfigError(f"'{text}' is no number of tokens; give a whole number such as 4096, 32k or 1M")
    return int(number)


def tokens_text(number: int) -> str:
    """32768 -> "32k", 1000 -> "1,000"."""
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else f"{number:,}"


def bytes_text(number: float) -> str:
    """With three digits and a decimal unit."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= 0.9995 * size:
            value = number / size
            return (
                f"{value:.2f} {unit}"
                if value < 9.995
                else f"{value:.1f} {unit}"
                if value < 99.95
                else f"{value:.0f} {unit}"
            )
    return f"{number:.0f} bytes"


def seconds_text(seconds: float) -> str:
    """In seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
