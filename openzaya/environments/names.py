"""Names with wildcards, chosen from those that there are."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from openzaya.errors import DataError


def choose_names(patterns: Sequence[str], known: Sequence[str], *, exclude: Sequence[str] = (), what: str) -> list[str]:
    """The ``known`` names that a pattern (``*`` and ``?``) names, in their order, without those of ``exclude``.

    Raises:
        DataError: a pattern that names nothing, with the nearest name; nothing is left.
    """
    for pattern in [*patterns, *exclude]:
        if not fnmatch.filter(known, pattern):
            near = difflib.get_close_matches(pattern, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {len(known)}, such as '{known[0]}'; '*' is all"
            raise DataError(f"no {what} is called '{pattern}'; {hint}")
    chosen = [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    chosen = [name for name in chosen if not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)]
    if not chosen:
        raise DataError(f"no {what} is left of {len(patterns)} names; name one, or exclude fewer")
    return chosen
