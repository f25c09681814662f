"""Checkpoints are whole or absent, whenever the process is killed; the last few are kept; bad ones are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openzaya.errors import CheckpointError
from openzaya.train.checkpoint import list_checkpoints, load_latest, save_checkpoint


def save(directory: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(directory, step, {"weights": torch.full((50,), float(step))}, keep=keep)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    directory = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.train.killed_saver", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return directory, [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_while_it_writes_the_newest_whole_checkpoint_is_resumed(killed) -> None:
    _, results = killed
    assert len(results) >= 20
    for before, after in zip([{"step": 0}, *results], results, strict=False):
        assert after["was_killed"], after
        assert after["is_whole"], after
        # Each child saves once before it is killed, so nothing that was finished is ever lost.
        assert after["step"] > before["step"], (before, after)
        assert len(after["leftover_bytes"]) <= 1


def test_the_kills_did_hit_the_write(killed) -> None:
    _, results = killed
    full_size = 2 * 4 * 400_000
    inside = [result for result in results if result["kill"].startswith("inside")]
    assert all(result["leftover_bytes"] for result in inside)
    sizes = [result["leftover_bytes"][0] for result in inside]
    assert sizes == sorted(sizes) and sizes[0] < 100 and full_size / 3 < sizes[len(sizes) // 2] < full_size
    by_name = {result["kill"]: result for result in results}
    assert by_name["before the rename"]["leftover_bytes"][0] > full_size
    # After the rename the new one counts although older ones are still there.
    assert by_name["before the removal"]["num_checkpoints"] == 3


def test_what_kills_left_behind_is_cleaned_by_the_next_save(killed) -> None:
    directory, results = killed
    (directory / "step-99999999.tmp").write_bytes(b"half")
    save_checkpoint(directory, results[-1]["step"] + 1, {}, keep=2)
    assert sorted(path.name for path in directory.iterdir()) == [path.name for path in list_checkpoints(directory)]
    assert len(list_checkpoints(directory)) == 2


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_few_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (1, 2, 9, 10, 100):
        save(tmp_path, step, keep)
    names = [f"step-{step:08d}.pt" for step in (1, 2, 9, 10, 100)][-keep:]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    state = load_latest(tmp_path)
    assert state is not None and state["step"] == 100 and bool((state["weights"] == 100).all())


def test_a_failed_write_leaves_the_older_ones(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(
        torch, "save", lambda value, file: file.write(b"x") and (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OSError, match="full"):
        save(tmp_path, 2)
    monkeypatch.undo()
    state = load_latest(tmp_path)
    assert state is not None and state["step"] == 1


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
    (tmp_path / "step-1.pt").write_bytes(b"not a name of ours")
    (tmp_path / "step-00000001.tmp").write_bytes(b"half")
    assert load_latest(tmp_path) is None


@pytest.mark.parametrize("damage", ["empty", "half", "last byte", "other file"])
def test_a_damaged_newest_one_is_refused_and_the_one_before_is_there(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    whole = newest.read_bytes()
    newest.write_bytes(
        {"empty": b"", "half": whole[: len(whole) // 2], "last byte": whole[:-1]}.get(damage, b"PK junk")
    )
    with pytest.raises(CheckpointError, match=r"step-00000002.pt cannot be read .* remove it to resume from the one"):
        load_latest(tmp_path)
    newest.unlink()
    state = load_latest(tmp_path)
    assert state is not None and state["step"] == 1


def test_another_format_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"openzaya_checkpoint_format": 99}, keep=1)
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        load_latest(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"step": 1, "weights": Payload()}, tmp_path / "step-00000001.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_latest(tmp_path)
    assert not (tmp_path / "ran").exists()
