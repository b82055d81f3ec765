"""Where `make cluster-demo` gets its images from."""

import subprocess

import click
import pytest

from asynception.hosts import demo


@pytest.fixture
def built(monkeypatch):
    """Commands that were run in place of building, and what each ended with."""
    commands, codes = [], [0]

    def run(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, codes[0])

    monkeypatch.setattr(demo.subprocess, "run", run)
    return commands, codes


def recipe_in(folder, name):
    path = folder / name
    path.touch()
    return path


def test_the_pictograms_are_built_where_their_recipe_looks_and_once(built, tmp_path, capsys):
    commands, _ = built
    recipe = recipe_in(tmp_path, "pictograms.toml")
    demo.provide_pictograms(recipe)
    (command,) = commands
    assert command[-4:] == ["data", "pictograms", "--out", str(tmp_path / "pictograms")]
    assert "pictograms is not there" in capsys.readouterr().out
    (tmp_path / "pictograms").mkdir()
    (tmp_path / "pictograms" / "train.manifest.json").touch()
    demo.provide_pictograms(recipe)
    assert len(commands) == 1


def test_other_recipes_bring_their_own_images(built, tmp_path):
    demo.provide_pictograms(recipe_in(tmp_path, "quickstart.toml"))
    assert not built[0]


def test_without_npm_another_recipe_is_named(built, tmp_path):
    built[1][0] = 2
    with pytest.raises(click.ClickException, match="RECIPE=recipes/quickstart"):
        demo.provide_pictograms(recipe_in(tmp_path, "pictograms.toml"))
