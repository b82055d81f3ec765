"""Every command in README and docs is one that the programs take as it stands there, and is run by
a test or has a reason why not."""

import itertools
import re

import click
import pytest
from documented import (
    CLUSTER,
    ELSEWHERE,
    NOT_RUN,
    SHOWN,
    STARTS_OF_NOT_RUN,
    SUITE,
    TRIALS,
    TUTORIAL,
    reason_not_to_run,
)
from shown import COMMANDS, OURS, ROOT

from asynception.cli import main
from asynception.recipe import known_keys, load_config, parse_overrides
from model.errors import InputError


def of(program):
    return [pytest.param(each, id=str(each)) for each in COMMANDS if each.words[0] == program]


def test_commands_are_found():
    programs = {each.words[0] for each in COMMANDS}
    assert programs >= {"asynception", "make", "python"}
    assert len([each for each in COMMANDS if each.words[0] in OURS]) > 60


@pytest.mark.parametrize("shown", of("asynception"))
def test_asynception_takes_it(shown):
    command, arguments = main, list(shown.words[1:])
    while isinstance(command, click.Group):
        name = arguments.pop(0)
        assert name in command.commands, shown
        command = command.commands[name]
    if "--help" in arguments:
        return
    context = command.make_context(command.name, arguments)
    settings = context.params.get("overrides") or ()
    check_settings(shown, [each for each in settings if each.startswith("--")], settings)


def check_settings(shown, keys, settings):
    known = set(known_keys())
    for key in keys:
        name = key[2:].partition("=")[0]
        section = name.rpartition(".")[0]
        assert name in known or section in known or name.startswith("model."), shown
    assert parse_overrides(settings) or not settings
    recipe = next((ROOT / word for word in shown.words if word.startswith("recipes/")), None)
    if recipe is not None and not recipe.is_relative_to(ROOT / "recipes" / "pictograms"):
        try:
            load_config(recipe, settings)
        except InputError as error:
            pytest.fail(f"{shown}: {error}")


@pytest.mark.parametrize("shown", of("make"))
def test_make_has_the_target(shown):
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert shown.words[1] in targets


@pytest.mark.parametrize("shown", of("python"))
def test_the_program_is_there_and_knows_its_options(shown):
    program, *arguments = shown.words[1:]
    if program == "-m":
        program = f"{arguments[0].replace('.', '/')}"
    path = ROOT / program
    if program == "draw.py":
        path = ROOT / "examples" / "shapes" / program
    assert path.exists(), shown
    files = path.rglob("*.py") if path.is_dir() else [path]
    source = "".join(each.read_text() for each in files)
    for option in (each.partition("=")[0] for each in arguments if each.startswith("--")):
        assert f'"{option}"' in source, (shown, option)


def test_each_is_run_or_has_a_reason_why_not():
    run = [trial.text for trial in TRIALS]
    not_run = {text for text in SHOWN if reason_not_to_run(text)}
    places = [*run, *ELSEWHERE, *not_run]
    assert sorted(places) == sorted(SHOWN), "each in one place, and none that no page shows"
    assert set(NOT_RUN) <= SHOWN
    for start in STARTS_OF_NOT_RUN:
        assert any(text.startswith(start) for text in SHOWN), start


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.text)
def test_what_is_replaced_stands_there_once(trial):
    words = trial.words(address="HOST:1", server="HOST:2")
    assert "{address}" not in words
    assert words[0] == trial.text.partition(" ")[0]


def test_what_is_said_to_be_run_elsewhere_is():
    assert set(ELSEWHERE.values()) == {TUTORIAL, SUITE}
    page = (ROOT / "docs" / "tutorial.md").read_text()
    scripts = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = list(itertools.chain.from_iterable(script.splitlines() for script in scripts))
    ours = {text for text, where in ELSEWHERE.items() if where == TUTORIAL}
    assert ours - set(lines) == {
        "cp -r examples/shapes ~/shapes && cd ~/shapes",  # the test copies them itself
        'export PATH="$PWD/.venv/bin:$PATH"',
    }
    runs = (ROOT / "tests" / "e2e" / "test_docs_runs.py").read_text()
    assert all(f'"{name}"' in runs for name in CLUSTER)
    for reason in [*NOT_RUN.values(), *STARTS_OF_NOT_RUN.values(), *ELSEWHERE.values()]:
        for path in re.findall(r"tests/\S+\.py", reason):
            assert (ROOT / path).is_file(), reason
