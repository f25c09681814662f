"""The chat page as it is sent: page.html with its second script, page_rsa.js, put in, and the policy for both.

The page asks for nothing else: one response holds all of it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE_PATH = Path(__file__).with_name("page.html")
RSA_SCRIPT_PATH = Path(__file__).with_name("page_rsa.js")
RSA_MARK = "/* page_rsa.js */"
"""Where the second script belongs."""
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def load_page() -> str | None:
    """The whole page; None where this installation has none."""
    if not PAGE_PATH.is_file() or not RSA_SCRIPT_PATH.is_file():
        return None
    return PAGE_PATH.read_text(encoding="utf-8").replace(RSA_MARK, RSA_SCRIPT_PATH.read_text(encoding="utf-8"))


def page_policy(page: str) -> str:
    """A content security policy that runs the page's own scripts and reaches this server alone."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in _SCRIPT.findall(page)]
    scripts = " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
