"""What pages quote is there: messages in the code, settings and their values in the config tree."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import tomli_w

from asynception.recipe import known_keys, load_config
from model.errors import InputError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = ("asynception", "worker", "ps", "model")
QUICKSTART = ROOT / "recipes" / "quickstart.toml"

CODE = re.compile(r"`([^`\n]+)`")
VALUE = "\0"
"""Where a message in the code has one."""


LEAST_FIXED = 0.5
"""Share of a quote that must be the fixed text of one message."""


@cache
def messages():
    """All texts in the code, each as its fixed parts, between which values stand."""
    texts = set()
    for path in (path for name in PACKAGES for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(each, "value", None) for each in node.values]
                fixed = "".join(each if isinstance(each, str) else VALUE for each in parts)
                texts.add(tuple(fixed.split(VALUE)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add((node.value,))
    return texts


def is_said(quote):
    """Whether a quote is of the code: ... is anything, and a semicolon may join two messages."""
    parts = [each.strip(" ;:,()") for each in quote.split("...") if re.search("[a-z]{3}", each)]
    return all(is_one(part) or all(map(is_one, part.split("; "))) for part in parts)


def is_one(text):
    return any(fixed_share(text, parts) >= LEAST_FIXED for parts in messages())


def fixed_share(text, parts):
    """How much of a text would be fixed if it were a stretch of this message."""
    if any(text in part for part in parts):
        return 1.0
    found = 0
    for index, part in enumerate(parts[:-1]):
        begins = next(n for n in range(len(part), -1, -1) if text.startswith(part[-n:] * (n > 0)))
        found = max(found, begins + _fixed_behind_value(text[begins:], parts[index + 1 :]))
    return found / len(text)


def _fixed_behind_value(text, parts):
    if not parts:
        return 0
    head, *rest = parts
    found = next((n for n in range(len(head), 0, -1) if text.endswith(head[:n])), 0)
    at = text.find(head, 1)
    if head and at > 0:
        end = at + len(head)
        found = max(found, len(head) + _fixed_behind_value(text[end:], rest))
    return found


def quoted_messages():
    """In the first column of troubleshooting's tables."""
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines():
        if line.startswith("| "):
            yield from (text for text in CODE.findall(line.split(" | ")[0]) if " " in text)


@pytest.mark.parametrize("quote", list(quoted_messages()))
def test_a_quoted_message_is_one(quote):
    assert is_said(quote)


def test_an_invented_message_is_none():
    assert len(list(quoted_messages())) > 8
    assert not is_said("worker 3 was given up after 600 s")
    assert not is_said("worker 3 was silent for 600 s; and nobody minded")
    assert not is_said("the cluster has ... no such words")


KEY = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
NO_SETTINGS = {"model.fit", "ray.util.metrics", "model.safetensors", "ema.safetensors"}
FILES = re.compile(
    r"(?:^|(?<=[ (]))(?:asynception|ps|worker|model|tests|benchmarks|examples|recipes|deploy|docs)"
    r"/[\w/.*-]*\w"
)
MADE = {"recipes/pictograms"}
"""By a command."""


def section_names():
    return {key.partition(".")[0] for key in known_keys()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_and_files_that_are_named_exist(page):
    named = CODE.findall(page.read_text())
    whole = set(known_keys()) | {key.rpartition(".")[0] for key in known_keys()} | NO_SETTINGS
    for text in filter(KEY.fullmatch, named):
        if text.partition(".")[0] in section_names() and not text.endswith(".py"):
            assert text in whole
    for path in (path for text in named for path in FILES.findall(text)):
        assert path in MADE or list(ROOT.glob(path)), path


ASSIGNED = re.compile(r"(?:\[([a-z_]+)\] )?([a-z_]+(?:\.[a-z_]+)*) = (.+)")
BLOCK = re.compile(r"^```toml\n(.*?)^```", re.MULTILINE | re.DOTALL)
STAND_INS = {"k", "L", "A"}
"""Letters that a page explains."""


def quoted_settings():
    """`section.key = value` and `[section] key = value`, and what stands in blocks of TOML."""
    sections = section_names()
    for page in PAGES:
        text = page.read_text()
        for found in filter(None, map(ASSIGNED.fullmatch, CODE.findall(text))):
            key = ".".join(filter(None, found.groups()[:2]))
            if "." in key and key.partition(".")[0] in sections:
                yield page, key, found[3]
        for block in BLOCK.findall(text):
            for key, value in flat(tomllib.loads(block)):
                yield page, key, inline(value)


def inline(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(each)}" for key, each in value.items()) + "}"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()


def flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and prefix + key not in known_keys():
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def settings_with_values():
    for page, key, value in dict.fromkeys(quoted_settings()):
        if value not in STAND_INS and "..." not in value:
            name = f"{page.relative_to(ROOT)}: {key} = {value}"
            yield pytest.param(key, value, id=name)


def refusal(key, value):
    """What is said of the value itself; it may also not fit to what else the recipe says."""
    try:
        load_config(QUICKSTART, (f"--{key}", value))
    except InputError as error:
        said = str(error)
        return (
            said if re.match(rf"{re.escape(key)} = .*: (input should|choose one)", said) else None
        )
    return None


@pytest.mark.parametrize(("key", "value"), list(settings_with_values()))
def test_a_quoted_setting_takes_its_value(key, value):
    assert key in known_keys() or key.startswith("model.")
    assert refusal(key, value) is None


def test_a_value_that_is_none_is_found():
    assert refusal("wire.pull", "bf16")
    assert refusal("consistency.mode", "fast")
    assert len(list(settings_with_values())) > 30
