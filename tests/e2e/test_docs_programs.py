"""Commands that README and docs show and that need no Ray: each is run, on little."""

import shlex
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from documented import DATA, PROGRAMS, WITHOUT_A_RUN
from processes import Command
from shown import ROOT
from stage import Stage, write_images, write_keras_xception

pytestmark = pytest.mark.long

DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stage")


@pytest.fixture(scope="module")
def stage(folder):
    stage = Stage(folder)
    write_images(folder)
    return stage


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(folder):
    """HOST:PORT of a web server of what is in the folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("trial", WITHOUT_A_RUN, ids=lambda trial: trial.text)
def test_what_needs_no_run(stage, monkeypatch, trial):
    monkeypatch.chdir(stage.folder)
    if "import-keras" in trial.text:
        write_keras_xception(stage.folder / "xception.weights.h5")
    assert stage.run(trial)


def test_sets_of_images_are_made_and_described(stage, server, monkeypatch):
    monkeypatch.chdir(stage.folder)
    for trial in DATA:
        assert stage.run(trial, server=server), trial.text
    made = {path.name for path in stage.folder.rglob("*.manifest.json")}
    assert {"train.manifest.json", "val.manifest.json"} <= made


@pytest.mark.parametrize("trial", PROGRAMS, ids=lambda trial: trial.text)
def test_a_program_does_a_little(tmp_path, trial):
    program, *words = trial.words()
    assert program == "python"
    command = shlex.join([sys.executable, *words])
    outcome = Command(tmp_path, "bash", "-c", f"cd {ROOT} && {command}").wait(DEADLINE_S)
    assert outcome.code == 0, str(outcome)
    assert outcome.stdout
