from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abste.errors import CheckpointError, RunError
from abste.train.checkpoint import (
    MAGIC,
    check_state,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from abste.train.files import remove_leftovers, write_atomic, write_json


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"model": {"w": torch.arange(1000.0)}, "step": 3, "seconds": 1.5, "none": None})
    return path


def test_round_trip(saved: Path) -> None:
    state = load_checkpoint(saved)
    assert torch.equal(state["model"]["w"], torch.arange(1000.0))
    assert (state["step"], state["seconds"], state["none"]) == (3, 1.5, None)
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("part", [0.01, 0.3, 0.7, 0.999])
def test_damage_is_found(saved: Path, part: float) -> None:
    data = saved.read_bytes()
    place = int(part * len(data))
    saved.write_bytes(data[:place])
    with pytest.raises(CheckpointError, match=r"truncated or damaged|not a checkpoint"):
        load_checkpoint(saved)
    flipped = bytearray(data)
    flipped[place] ^= 4
    saved.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"truncated or damaged|not a checkpoint"):
        load_checkpoint(saved)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(path)
    for data in (b"", b"PK\x03\x04 a zip", MAGIC):
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


class _Evil:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.witness),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_loading_runs_no_code(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    for protocol in (2, 4):
        buffer = io.BytesIO()
        torch.save({"x": _Evil(witness)}, buffer, pickle_protocol=protocol)
        for payload in (buffer.getvalue(), pickle.dumps(_Evil(witness), protocol)):
            digest = hashlib.sha256(payload).hexdigest().encode()
            (tmp_path / "evil.ckpt").write_bytes(MAGIC + digest + b"\n" + payload)
            with pytest.raises(CheckpointError, match="cannot be read"):
                load_checkpoint(tmp_path / "evil.ckpt")
    assert not witness.exists()


def test_random_streams_continue(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        values: list[Any] = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
        return [*values, torch.rand(1).item(), torch.randn(1).item()]

    draw()
    save_checkpoint(tmp_path / "c", {"random": random_state(torch.device("cpu"))})
    expected = [draw(), draw()]
    set_random_state(load_checkpoint(tmp_path / "c")["random"], torch.device("cpu"))
    assert [draw(), draw()] == expected


def test_other_model() -> None:
    wanted = {"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.int64)}
    check_state(Path("x"), dict(wanted), wanted)
    for change, message in (
        ({"a": torch.zeros(3)}, r"x is of another model .* 'a' has shape \(3,\), not \(2,\)\.$"),
        ({"b": torch.zeros(3)}, "'b' has dtype"),
        ({"c": torch.zeros(1)}, "it has 'c', which the model has not"),
        ({"a": torch.zeros(3), "c": torch.zeros(1)}, r"\(and 1 more tensors differ\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_state(Path("x"), wanted | change, wanted)
    with pytest.raises(CheckpointError, match="it lacks 'a'"):
        check_state(Path("x"), {"b": wanted["b"]}, wanted)


def test_atomic_writes_replace_files_alone(tmp_path: Path) -> None:
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "deep" / "file"
    os.mkfifo(pipe)
    file.parent.mkdir()
    link.symlink_to(file)
    for content in (b"one", b"two"):  # at first there is nothing behind the link
        write_atomic(link, content)
        assert link.is_symlink() and file.read_bytes() == content
    for path in (pipe, tmp_path, Path("/")):
        with pytest.raises(RunError, match=f"^cannot write {path}: what is there is no regular file; give another"):
            write_atomic(path, b"")
    with pytest.raises(RunError, match=r"cannot write .*file/x: Not a directory"):
        write_atomic(file / "x", b"")
    assert pipe.is_fifo() and sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "file", "link", "pipe"]


def test_atomic_writes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o444  # readable as other files are
    with pytest.raises(RunError, match=r"cannot write .* No such file"):
        write_atomic(tmp_path / "gone" / "file", b"")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("nan")})
    (tmp_path / "last.ckpt.123.tmp").write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"two"
