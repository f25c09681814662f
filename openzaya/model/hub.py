"""From a path or a hub id to a local directory that holds a checkpoint.

An existing local path always wins. Otherwise ``owner/name`` is looked up with ``huggingface_hub``,
which keeps its cache under HF_HOME, sends HF_TOKEN, and with HF_HUB_OFFLINE=1 answers from the cache
alone. Only weights, JSON, templates and tokenizer models are fetched; never code.

The released ZAYA files themselves were not loaded where this was developed (no hub was reachable):
what is tested are miniatures with their names and layout, and a cache laid out as the hub client does.
"""

from __future__ import annotations

import re
from pathlib import Path

from openzaya.errors import CheckpointError

ALLOW_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The local directory of a checkpoint; downloads it if needed.

    Args:
        path_or_hub_id: an existing directory, or ``owner/name`` on the hub.
        revision: branch, tag or commit on the hub; refused for a local path.

    Raises:
        CheckpointError: neither a directory nor a hub id that can be had.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"revision='{revision}' with the local directory {path}; leave the revision out")
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file, expected a checkpoint directory; pass the directory that holds it")
    name = str(path_or_hub_id)
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such directory, and no hub id (owner/name); check the path")

    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(ALLOW_PATTERNS)))
    except Exception as error:  # the client raises its own, httpx and OS errors alike
        reason = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            f"{name}: no such directory here, and the hub could not give it ({type(error).__name__}: {reason[0]}); "
            "check the name, the network and HF_TOKEN, or copy the checkpoint into the cache (HF_HOME) and set "
            "HF_HUB_OFFLINE=1"
        ) from error
