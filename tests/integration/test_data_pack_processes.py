"""Packing in several processes, and after kills: always the same bytes."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
from PIL import Image

from asynception.data.image_folders import list_image_folder
from asynception.data.pack import pack
from asynception.data.pack_plan import PackSettings

SETTINGS = PackSettings(shard_num_bytes=20_000, bucket_num_bytes=200)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(60):
        path = root / "xyz"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (10, 30, 3), np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """What an uninterrupted pack in one process writes."""
    out = tmp_path_factory.mktemp("whole")
    pack(list_image_folder(images, "train"), out, SETTINGS)
    return content(out)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_any_number_of_workers_writes_the_same_bytes(images, whole, tmp_path):
    pack(list_image_folder(images, "train"), tmp_path, SETTINGS, num_workers=3)
    assert content(tmp_path) == whole


KILLED = """
import os, psutil, signal, sys
from pathlib import Path
from asynception.data.image_folders import list_image_folder
from asynception.data.pack import pack
from asynception.data.pack_plan import PackSettings

def report(stage, done, total):
    if stage == "writing shards" and done >= int(sys.argv[3]):
        workers = psutil.Process().children(recursive=True)
        Path(sys.argv[5]).write_text(" ".join(str(worker.pid) for worker in workers))
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    settings = PackSettings(shard_num_bytes=20_000, bucket_num_bytes=200)
    listing = list_image_folder(Path(sys.argv[1]), "train")
    pack(listing, Path(sys.argv[2]), settings, num_workers=int(sys.argv[4]), report=report)
"""


@pytest.mark.parametrize("num_workers", [1, 2])
def test_after_a_kill_it_goes_on_and_gives_the_same_bytes(images, whole, tmp_path, num_workers):
    out = tmp_path / "killed"
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(images), str(out), "20"]
    command += [str(num_workers), str(tmp_path / "workers")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    assert len(workers) >= num_workers or num_workers == 1
    _, alive = psutil.wait_procs(filter(None, map(process, workers)), timeout=60)
    assert not alive
    finished = (out / ".pack-train" / "journal.jsonl").read_bytes().count(b"\n") - 1
    assert finished >= 1
    before = {path: path.stat().st_mtime_ns for path in out.glob("train-*.tar")}
    journaled = json.loads((out / ".pack-train/journal.jsonl").read_text().splitlines()[1])
    # What a kill in the middle of a write leaves behind, at its worst.
    (out / ".train-000099.tar.1.part").write_bytes(b"half")
    with open(out / ".pack-train" / "journal.jsonl", "ab") as journal:
        journal.write(b'{"split": "tr')
    result = pack(list_image_folder(images, "train"), out, SETTINGS)
    assert result.num_resumed == finished
    assert content(out) == whole
    kept = out / journaled["entry"][0]
    assert kept.stat().st_mtime_ns == before[kept]


def process(pid):
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None
