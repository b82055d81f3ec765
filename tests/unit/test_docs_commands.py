"""Every command in README and docs is one that the programs take as it stands there."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from asynception.cli import main
from asynception.recipe import known_keys, load_config, parse_overrides
from model.errors import InputError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {
    ROOT / "docs" / "reference" / "commands.md",
    ROOT / "docs" / "reference" / "settings.md",
}
STAND_INS = re.compile(r"\[--section\.key value \.\.\.\]")
"""Where a page shows that anything may follow."""

_START = re.compile(
    r"^(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(asynception|make|python|pytest)(?= )", re.MULTILINE
)


@dataclass(frozen=True)
class Shown:
    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def shown_on(page):
    """Commands that stand on lines of their own, in blocks of code."""
    text = page.read_text().replace("\\\n", " ")
    for line in blocks(text):
        line = STAND_INS.sub("", line.split(" | ")[0].strip())
        if found := _START.match(line):
            words = shlex.split(line[found.start(1) :].replace("…", ""), comments=True)
            yield Shown(str(page.relative_to(ROOT)), tuple(words))


def blocks(text):
    """Lines of fenced or indented code."""
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line


COMMANDS = [shown for page in PAGES if page not in GENERATED for shown in shown_on(page)]


def of(program):
    return [pytest.param(each, id=str(each)) for each in COMMANDS if each.words[0] == program]


def test_commands_are_found():
    programs = {each.words[0] for each in COMMANDS}
    assert programs >= {"asynception", "make", "python"}
    assert len(COMMANDS) > 60


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
