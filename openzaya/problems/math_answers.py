"""Mathematical answers as text: the last box of a solution, and one spelling for what is written in many ways.

Numbers are written by value, and fractions, units and typography are removed: ``"x = \\dfrac{1}{2}."``, ``"0.50"`` and
``"1/2"`` all give ``1/2``. What is equal but spelled otherwise is for a computer algebra system to find.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_NUMBER_DIGITS = 200
"""A longer number is compared as text: its value would take long to work out."""

# Runs of blanks are bounded in all patterns: a model that repeats itself writes very long ones.
_BRACE = re.compile(r"\\f?boxed\s{0,8}\{|\\fbox\s{0,8}\{|\\[\\{}]|[{}]")


def last_boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}`` or ``\\fbox{...}`` whose braces balance."""
    opened: list[int | None] = []  # where a box's content begins; None for other braces
    last: tuple[int, int] | None = None
    for found in _BRACE.finditer(text):
        sign = found.group()
        if sign == "}":
            start = opened.pop() if opened else None
            if start is not None and (last is None or start > last[0]):
                last = start, found.start()
        elif sign[-1] == "{" and sign != r"\{":
            opened.append(found.end() if "box" in sign else None)
    return None if last is None else text[last[0] : last[1]].strip()


_TYPOGRAPHY = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|big|Big|bigg|Bigg)(?![A-Za-z])|\\[!,;:> ]|\\(?:quad|qquad)(?![A-Za-z])|~"
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=\d)(?:\^\{?\\circ\}?|\\degree|°|\\?%)$")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_VALUE = re.compile(r"([+-]?)(\d+)(?:\.(\d*))?(?:/(\d+))?|([+-]?)\.(\d+)")


def normalise_math(text: str) -> str:
    """One spelling of a mathematical answer: ``"x = \\dfrac{1}{2}."``, ``"0.50"`` and ``"1/2"`` all give ``1/2``."""
    text = text.strip().strip("*").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.rstrip(".").endswith(closing) and len(text) > len(opening):
            text = text.rstrip(".").removeprefix(opening).removesuffix(closing)
    text = _TYPOGRAPHY.sub("", text.replace("−", "-").replace(r"\$", "").lstrip("$"))
    text = _WRAPPED.sub(r" \1 ", text)
    text = re.sub(r"\s+", "", text).rstrip(".,;")
    text = re.sub(r"^(?:[A-Za-z](?:\([a-z]\))?)?=", "", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,)(?=\d{3}(?!\d))", "", text) if _has_only_thousands(text) else text
    text = _UNIT.sub("", text)
    text = _FRACTION.sub(_slashed, text)
    text = re.sub(r"^(-?\d[\d./]*)(?:[A-Za-z]{2,}(?:\^\{?\d\}?)?)$", r"\1", text)  # 12cm, 5units
    return _valued(text)


def _has_only_thousands(text: str) -> bool:
    """Whether commas separate thousands: in ``(1,234)`` or ``1,2`` they may separate entries."""
    return re.fullmatch(r"[^\d(\[{]*\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?[^\d,]*", text) is not None


def _slashed(found: re.Match[str]) -> str:
    above, below = found.group(1) or found.group(2) or "", found.group(3) or found.group(4) or ""
    return "/".join(part if re.fullmatch(r"\w+", part) else f"({part})" for part in (above, below))


def _valued(text: str) -> str:
    """A plain number by its value."""
    found = _VALUE.fullmatch(text)
    if found is None or len(text) > MAX_NUMBER_DIGITS or "/0" in text:
        return text
    sign, whole, decimals, below, bare_sign, bare_decimals = found.groups(default="")
    if bare_decimals:
        sign, whole, decimals = bare_sign, "0", bare_decimals
    value = Fraction(int(whole + decimals), 10 ** len(decimals)) / int(below or 1)
    return str(-value if sign == "-" else value)
