"""From hub ids to directories: a local path first, the cache when offline, one clear error otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from openzaya.errors import CheckpointError
from openzaya.model import hf
from openzaya.model.hub import ALLOW_PATTERNS, resolve
from tests.model.hf_miniatures import MINI, NATIVE_CONFIG, native_state, write

ROOT = Path(__file__).parents[2]


def fake_cache(home: Path, name: str) -> None:
    """A cache as the hub client lays it out: blobs, snapshots of links to them, refs."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = home / "hub" / ("models--" + name.replace("/", "--"))
    source = write(home / "source", {**NATIVE_CONFIG, "dtype": "float32"}, native_state(MINI), shards=2)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = repository / "blobs" / f"{number:040d}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


def run_offline(home: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=home)


def test_offline_cache_is_read_and_a_miss_is_one_clear_error(tmp_path):
    fake_cache(tmp_path, "Zyphra/ZAYA1-mini")
    code = (
        "from openzaya.model import hf\n"
        "from openzaya.errors import CheckpointError\n"
        "print(hf.load('Zyphra/ZAYA1-mini').config.hidden_size, hf.inspect('Zyphra/ZAYA1-mini').ok)\n"
        "try:\n"
        "    hf.load('Zyphra/ZAYA1-absent')\n"
        "except CheckpointError as error:\n"
        "    print(str(error).count('\\n'), error)\n"
    )
    result = run_offline(tmp_path, code)
    first, second = result.stdout.splitlines()
    assert first == "32 True"
    assert second.startswith("0 Zyphra/ZAYA1-absent") and "HF_HUB_OFFLINE" in second


def test_local_directory_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "Zyphra" / "ZAYA1-8B", {**NATIVE_CONFIG, "dtype": "float32"}, native_state(MINI))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert resolve("Zyphra/ZAYA1-8B") == Path("Zyphra/ZAYA1-8B")
    assert hf.load("Zyphra/ZAYA1-8B").config == MINI
    with pytest.raises(CheckpointError, match="revision"):
        resolve("Zyphra/ZAYA1-8B", revision="v1")


def test_download_asks_for_weights_and_texts_only(tmp_path, monkeypatch):
    source = write(tmp_path / "snapshot", {**NATIVE_CONFIG, "dtype": "float32"}, native_state(MINI))
    calls = []

    def download(name: str, **options: object) -> str:
        calls.append((name, options))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf.load("Zyphra/ZAYA1-8B", revision="abc").config == MINI
    assert calls == [("Zyphra/ZAYA1-8B", {"revision": "abc", "allow_patterns": list(ALLOW_PATTERNS)})]
    assert not any(pattern.endswith((".py", ".bin")) for pattern in ALLOW_PATTERNS)


def test_network_errors_become_one_message(monkeypatch):
    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("name resolution failed\nmore detail")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"ConnectionError: name resolution failed\)") as error:
        resolve("Zyphra/ZAYA1-8B")
    assert "\n" not in str(error.value)
