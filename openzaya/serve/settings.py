"""What a server allows and how it behaves; the command line's flags fill it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

EFFORT_BUDGETS: dict[str, int | None] = {
    "none": 0,
    "minimal": 256,
    "low": 1024,
    "medium": 4096,
    "high": None,
    "xhigh": None,
}
"""Most tokens of reasoning for each effort; None: no limit of its own. ``none`` switches thinking off."""


EFFORT_WIDTHS: dict[str, dict[str, int] | None] = {
    "none": None,
    "minimal": None,
    "low": {"n": 4, "c": 4, "t": 1},
    "medium": {"n": 8, "c": 4, "t": 2},
    "high": {"n": 16, "c": 4, "t": 2},
    "xhigh": {"n": 32, "c": 4, "t": 2},
}
"""Width and depth of Markovian RSA for each effort, with ``effort_rsa``; None: a plain answer."""


class ServerSettings(BaseModel):
    """Limits, access and defaults of one server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_names: tuple[str, ...] = Field(("zaya",), min_length=1)
    """Names that requests may give; the first is the one shown."""
    api_key: SecretStr | None = None
    allowed_hosts: tuple[str, ...] | None = None
    """Names in the Host header that are answered; None: any. Keeps web pages from reaching a server without a key."""
    cors_origins: tuple[str, ...] = ()

    context: int | None = Field(None, ge=2)
    """Most tokens of prompt and answer together; None: as many as the model has positions."""
    max_tokens_limit: int | None = Field(None, ge=1)
    """Most tokens of one answer; larger wishes are cut to it."""
    max_candidates: int = Field(128, ge=1)
    """Prompts times ``n`` of one request."""
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    effort: Effort = "high"
    """Where a request says nothing about thinking."""

    effort_rsa: bool = False
    """A request's ``reasoning_effort`` is answered with Markovian RSA of that width and depth."""
    rsa_defaults: dict[str, Any] = {}
    """Settings of RSA that hold where neither a request's fields nor its ``rsa`` say otherwise."""
    rsa_max_rollouts: int = Field(512, ge=1)
    rsa_max_tokens: int = Field(16_000_000, ge=1)
    """Most tokens that the rollouts of one request may generate if all of them use up their budgets."""
    rsa_max_running: int = Field(16, ge=1)
    """RSA requests at a time; more get 429."""
    rsa_concurrency: int = Field(64, ge=1)
    """Rollouts at a time of one request; with a proxy, of all."""
    rsa_timeout_s: float = Field(4 * 3600.0, gt=0)
    """As ``request_timeout_s``, for a request with RSA."""

    request_timeout_s: float = Field(1800.0, gt=0)
    body_timeout_s: float = Field(30.0, gt=0)
    """For a request's body to arrive."""
    keepalive_s: float = Field(15.0, gt=0)
    """A stream that has nothing to say sends a comment this often."""
    drain_s: float = Field(120.0, ge=0)
    """Running requests may take this long after the signal to stop."""
    retry_after_s: int = Field(5, ge=1)

    log_prompts: bool = False
    """Write the messages and prompts of requests into the log."""

    @property
    def model_name(self) -> str:
        return self.model_names[0]
