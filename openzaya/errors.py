"""Every error that OpenZAYA raises on purpose.

A user's mistake becomes an ``OpenZayaError`` whose message names three things: the value that was
found, the limit or expectation that it broke, and what to change. The command line prints the
message alone (exit code 1, or 2 for wrong usage); a traceback always means a defect of ours.
"""


class OpenZayaError(Exception):
    """Base of all errors meant for the user: the message says value, limit and remedy."""


class ConfigError(OpenZayaError):
    """A recipe, preset, override or model configuration that cannot be used as written."""


class CheckpointError(OpenZayaError):
    """A checkpoint that is incomplete, inconsistent, unknown, or cannot be written as asked."""


class DataError(OpenZayaError):
    """Training or evaluation data that is missing, malformed, or cannot fit the limits given."""


class TrainingError(OpenZayaError):
    """A run that cannot go on, such as one whose gradients are no longer finite."""


class EngineError(OpenZayaError):
    """A request that the inference engine cannot serve, or an engine that cannot be set up as asked."""


class QueueFull(EngineError):
    """The engine holds as many waiting requests as it may: try again later."""


class RSAError(OpenZayaError):
    """A run of test-time compute that cannot begin, or ended without any candidate."""


class CompletionFailed(RSAError):
    """One rollout failed for good: refused by the endpoint, or not to be had after all retries."""


class SandboxError(OpenZayaError):
    """Limits or tests that the sandbox cannot run as asked."""


class SandboxUnavailable(SandboxError):
    """This machine offers no isolation that holds: programs are not run at all rather than run unprotected."""
