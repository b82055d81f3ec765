"""Packages are fetched with npm, once, and only as they were published."""

import base64
import hashlib
import io
import json
import os
import stat
import tarfile

import pytest

from asynception.data.pictograms.packages import PACKAGES, Package, fetch_packages
from model.errors import InputError


def archive_of(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def package_of(content, name="@some/icons"):
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    return Package(name, "1.2.3", f"sha512-{digest}", "icons", "MIT", "2020 Someone")


ARCHIVE = archive_of({"meta.json": b'{"a": 1}', "svg/b.svg": b"<b/>", "svg/a.svg": b"<a/>"})
PACKAGE = package_of(ARCHIVE)


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A stand-in for npm: notes its arguments, then runs the given lines of shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "published.tgz").write_bytes(ARCHIVE)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin{os.pathsep}/usr/bin")

    def install(script):
        path = folder / "npm"
        path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{script}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    install(f"cp {tmp_path}/published.tgz {PACKAGE.archive_name}")
    return install


def calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_a_missing_archive_is_fetched_without_scripts_and_then_found(tmp_path, npm):
    folder = tmp_path / "packages"
    for _ in range(2):
        files = fetch_packages((PACKAGE,), folder)["@some/icons"]
    assert calls(tmp_path) == ["pack @some/icons@1.2.3 --ignore-scripts --loglevel=error"]
    assert os.listdir(folder) == ["some-icons-1.2.3.tgz"]
    assert files.json("meta.json") == {"a": 1}
    assert list(files.read(r"svg/[^/]+\.svg").items()) == [
        ("svg/a.svg", b"<a/>"),
        ("svg/b.svg", b"<b/>"),
    ]


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b""])
def test_other_bytes_than_the_published_ones_are_refused(tmp_path, npm, change):
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / PACKAGE.archive_name).write_bytes(change(ARCHIVE))
    with pytest.raises(InputError, match=r"some-icons-1\.2\.3\.tgz: isn't @some/icons 1\.2\.3"):
        fetch_packages((PACKAGE,), folder)
    assert calls(tmp_path) == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"echo other > {PACKAGE.archive_name}", "isn't @some/icons 1.2.3 as it was published"),
        ("true", "can't be read"),
        (
            "echo 'npm error code E404' >&2; echo 'npm error 404 Not Found - GET' >&2; exit 1",
            "npm can't fetch @some/icons@1.2.3 (404 Not Found - GET)",
        ),
    ],
)
def test_what_npm_does_wrong_is_told_in_one_line_and_leaves_nothing(tmp_path, npm, script, reason):
    npm(script)
    with pytest.raises(InputError) as caught:
        fetch_packages((PACKAGE,), tmp_path / "packages")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "packages") == []


def test_npm_that_hangs_is_given_up(tmp_path, npm, monkeypatch):
    monkeypatch.setattr("asynception.data.pictograms.packages.FETCH_TIMEOUT_S", 0.2)
    npm("exec sleep 60")
    with pytest.raises(InputError, match=r"npm has not fetched @some/icons@1\.2\.3 within 0\.2 s"):
        fetch_packages((PACKAGE,), tmp_path / "packages")


def test_without_npm_the_line_tells_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"npm is missing.*npm pack @some/icons@1\.2\.3") as caught:
        fetch_packages((PACKAGE,), tmp_path / "packages")
    assert f"put some-icons-1.2.3.tgz into {tmp_path / 'packages'}" in str(caught.value)
    (tmp_path / "packages" / PACKAGE.archive_name).write_bytes(ARCHIVE)
    assert fetch_packages((PACKAGE,), tmp_path / "packages")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--packages .*file: can't hold the packages"):
        fetch_packages((PACKAGE,), tmp_path / "file")


def test_the_pinned_packages_are_distinct_and_of_open_licences():
    assert len({p.name for p in PACKAGES}) == len({p.integrity for p in PACKAGES}) == len(PACKAGES)
    assert {p.licence for p in PACKAGES} == {"MIT", "ISC", "Apache-2.0"}
    for package in PACKAGES:
        assert len(base64.b64decode(package.integrity.removeprefix("sha512-"))) == 64
    assert "openmoji" not in json.dumps([p.name for p in PACKAGES])
