"""Whole runs through the command line, on a local Ray: faults, resuming, bad input."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file

from model.registry import create_model

NUM_TRAIN, NUM_VAL, BATCH = 256, 64, 16
DEADLINE_S = 240
COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30)]


def write_shard(path: Path, count: int, seed: int) -> None:
    """Images whose colour is their label; every one also carries label 4."""
    draw = random.Random(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            label = draw.randrange(4)
            image = Image.new("RGB", (32, 32), COLOURS[label])
            image.putpixel((draw.randrange(32), draw.randrange(32)), (0, 0, 0))
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            data = buffer.getvalue()
            record = json.dumps({"labels": [label, 4]}).encode()
            for name, content in ((f"{i:04}.png", data), (f"{i:04}.json", record)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    write_shard(folder / "train.tar", NUM_TRAIN, 0)
    write_shard(folder / "val.tar", NUM_VAL, 1)
    path = folder / "tiny.toml"
    path.write_text(
        f"""
        model = {{ width = 0.05, middle_blocks = 0 }}
        data = {{ train = "train.tar", val = "val.tar", image_size = 32, batch_size = {BATCH} }}
        training = {{ epochs = 6, clip_norm = 1.0 }}
        schedule = {{ kind = "constant", lr = 0.05 }}
        ema = {{ decay = 0.9 }}
        scaling = {{ num_workers = 2, num_servers = 2 }}
        run = {{ storage_path = "{folder / "runs"}", log_every_s = 1.0 }}
        """
    )
    return path


def command(recipe: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "asynception", "train", str(recipe), *arguments]


def run(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, *arguments), capture_output=True, text=True, timeout=DEADLINE_S
    )


def start(recipe: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(recipe, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for(condition, what: str):
    deadline_s = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"no {what} in {DEADLINE_S} s"
        time.sleep(0.1)
    return found


def actors(driver: subprocess.Popen[bytes], name: str) -> list[psutil.Process]:
    children = psutil.Process(driver.pid).children(recursive=True)
    return [c for c in children if c.is_running() and any(name in word for word in c.cmdline())]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=0.1)[1]


def result(recipe: Path, name: str) -> dict:
    return json.loads((recipe.parent / "runs" / name / "result.json").read_text())


def saved(recipe: Path, name: str) -> list[Path]:
    return sorted((recipe.parent / "runs" / name / "checkpoints").glob("checkpoint-*"))


@pytest.fixture(scope="module")
def finished(recipe):
    done = run(recipe, "--run.name", "plain")
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe.parent / "runs" / "plain"


def test_a_run_learns_and_writes_its_folder(recipe, finished):
    outcome = result(recipe, "plain")
    assert outcome["status"] == "finished"
    assert outcome["mode"] == "async"
    assert outcome["samples"] == 6 * NUM_TRAIN
    assert outcome["updates"] == 6 * NUM_TRAIN // BATCH
    assert outcome["receipts"] == {"applied": 2 * outcome["updates"]}
    assert outcome["eval"].keys() == outcome["baseline"].keys() == {"map@100", "loss"}
    assert outcome["eval"]["map@100"] > outcome["baseline"]["map@100"]
    assert set(outcome["staleness"]) == {"mean", "p50", "p99", "max"}
    assert Path(outcome["checkpoint"]).is_dir()
    assert (finished / "config.toml").is_file()
    assert list((finished / "tensorboard").iterdir())
    kinds = {json.loads(line)["kind"] for line in (finished / "metrics.jsonl").open()}
    assert {"train", "eval"} <= kinds


def test_evaluate_and_export_use_the_checkpoint(recipe, finished, tmp_path):
    base = [sys.executable, "-m", "asynception"]
    printed = subprocess.run(
        [*base, "evaluate", str(finished)], capture_output=True, text=True, check=True
    )
    again = json.loads(printed.stdout)["eval"]
    assert again == pytest.approx(result(recipe, "plain")["eval"], rel=1e-3)
    out = tmp_path / "model.safetensors"
    subprocess.run([*base, "export", str(finished), "--out", str(out), "--ema"], check=True)
    model = create_model("xception", 5, width=0.05, middle_blocks=0)
    model.load_state_dict(load_file(out), strict=True)


def test_a_killed_worker_is_replaced_and_no_sample_is_lost(recipe):
    driver = start(recipe, "--run.name", "worker", "--training.epochs", "40")
    victim = wait_for(lambda: actors(driver, "ray::WorkerProcess.run"), "worker")[0]
    metrics = recipe.parent / "runs" / "worker" / "metrics.jsonl"
    wait_for(
        lambda: metrics.is_file() and re.search(r'"pushes": [1-9]', metrics.read_text()), "push"
    )
    victim.send_signal(signal.SIGKILL)
    assert driver.wait(DEADLINE_S) == 0
    outcome = result(recipe, "worker")
    assert outcome["samples"] == 40 * NUM_TRAIN
    assert outcome["worker_failures"] == 1


def test_a_killed_run_leaves_no_process_and_is_resumed_to_the_same_samples(recipe):
    name = ("--run.name", "resumed", "--training.epochs", "60")
    driver = start(recipe, *name, "--checkpoint.every_s", "1")
    wait_for(lambda: saved(recipe, "resumed"), "checkpoint")
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_for(lambda: gone(children), "end of the killed run's processes")
    done = run(recipe, *name, "--resume", "--scaling.num_servers", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = result(recipe, "resumed")
    assert outcome["status"] == "finished"
    assert outcome["samples"] == 60 * NUM_TRAIN


def test_ctrl_c_ends_everything(recipe):
    driver = start(recipe, "--run.name", "stopped", "--training.epochs", "500")
    wait_for(lambda: actors(driver, "ray::WorkerProcess.run"), "worker")
    children = psutil.Process(driver.pid).children(recursive=True)
    os.kill(driver.pid, signal.SIGINT)
    assert driver.wait(DEADLINE_S) == 130
    wait_for(lambda: gone(children), "end of the run's processes")
    assert result(recipe, "stopped")["status"] == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data.trian", "x"], "data.train"),
        (["--training.epochs", "many"], "training.epochs"),
        (["--scaling.num_servers", "1000000"], "scaling.num_servers"),
        (["--data.train", "/nowhere"], "/nowhere"),
        (["--data.num_classes", "3"], "data.num_classes"),
        (["--data.image_size", "3"], "7"),
        (["--training.objective", "softmax"], "label"),
        (["--resume"], "resume"),
        (["--scaling.num_workers", "1000"], "scaling.num_workers"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(recipe, arguments, says):
    done = run(recipe, "--run.name", "bad", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert "Traceback" not in done.stdout
    assert not (recipe.parent / "runs" / "bad").exists()


def test_a_name_in_use_and_another_model_are_refused(recipe, finished):
    again = run(recipe, "--run.name", "plain")
    assert again.returncode == 2
    assert "in use" in again.stderr
    other = run(recipe, "--run.name", "plain", "--resume", "--model.width", "0.1")
    assert other.returncode == 2, other.stdout + other.stderr
    assert "another model" in other.stderr
