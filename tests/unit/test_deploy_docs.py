"""Commands and settings on the pages of docs/deploy, against the programs that take them."""

import re
import shlex
import tomllib

import pytest
from deploy_rendering import ROOT
from ray.scripts.scripts import cli as ray_cli

from asynception.cli import main as asynception_cli
from asynception.recipe import known_keys, parse_overrides

PAGES = sorted((ROOT / "docs" / "deploy").glob("*.md"))
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*$")


def blocks(page, language):
    """Fenced blocks of a page, without their indentation."""
    for indent, found, body in BLOCK.findall(page.read_text()):
        if found == language:
            yield re.sub(rf"^{indent}", "", body, flags=re.M)


def commands(page):
    """Command lines of a page, as words, without variables set before them."""
    for body in blocks(page, ""):
        for line in body.splitlines():
            words = shlex.split(line, comments=True)
            while words and ASSIGNMENT.match(words[0]):
                words.pop(0)
            if words:
                yield words


def keys_of(tree, path=()):
    for key, value in tree.items():
        if len(path) == 0:
            yield from keys_of(value, (key,))
        else:
            yield ".".join((*path, key))


def check_ray(words):
    command, context = ray_cli, None
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    context = command.make_context(name, list(words))
    if name == "submit":
        check(list(context.params["entrypoint"]))


def check_asynception(words):
    name, *words = words
    context = asynception_cli.commands[name].make_context(name, list(words))
    tree = parse_overrides(context.params.get("overrides", ()))
    assert set(keys_of(tree)) <= set(known_keys())


def check_path(words, *options):
    """The path after an option exists in the repository."""
    (at,) = [i for i, word in enumerate(words) if word in options]
    assert (ROOT / words[at + 1]).exists()


def check(words):
    """Raises for an option, a setting or a file that isn't there."""
    match words:
        case ["ray", *rest]:
            check_ray(rest)
        case ["asynception", *rest]:
            check_asynception(rest)
        case ["train_or_resume.sh", recipe, _, name, *rest]:
            check_asynception(["train", recipe, "--run.name", name, *rest])
        case ["sbatch", *rest]:
            at = rest.index("deploy/slurm/train.sbatch")
            check(["train_or_resume.sh", rest[at + 1], rest[at + 2], "name", *rest[at + 3 :]])
        case ["kubectl", "apply", *rest]:
            check_path(rest, "-k")
        case ["kubectl", "kustomize", path]:
            assert (ROOT / path / "kustomization.yaml").is_file()
        case ["docker", "build", *rest]:
            check_path(rest, "-f", "--file")
        case ["docker", "run", *rest]:
            check(rest[rest.index("asynception") :])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_have_options_that_exist(page):
    for words in commands(page):
        check(words)


def test_the_commands_are_found():
    found = [words[0] for page in PAGES for words in commands(page)]
    assert found.count("ray") >= 10
    assert {"kubectl", "docker", "sbatch", "asynception"} <= set(found)


@pytest.mark.parametrize(
    "line",
    [
        "ray up --yess deploy/ray/aws.yaml",
        "ray job submit --workingdir . -- asynception train recipe.toml",
        "ray job submit --working-dir . -- asynception train recipe.toml --run.nam first",
        "asynception train recipe.toml --scaling.workers 2",
        "kubectl apply -k deploy/kuberay/overlays/none",
        "docker build -f deploy/Dockerfile .",
    ],
)
def test_a_wrong_command_is_found(line):
    import click

    with pytest.raises((click.UsageError, AssertionError)):
        check(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_exist(page):
    known = set(known_keys())
    for body in blocks(page, "toml"):
        assert set(keys_of(tomllib.loads(body))) <= known
    text = page.read_text()
    sections = {key.partition(".")[0] for key in known}
    named = re.findall(r"`([a-z]+\.[a-z_.]+)(?: = [^`]*)?`", text)
    assert {name for name in named if name.partition(".")[0] in sections} <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_and_pages_that_are_named_exist(page):
    text = page.read_text()
    for path in re.findall(r"`?(deploy/[\w./-]+)", text):
        assert (ROOT / path.rstrip(".")).exists(), path
    for link in re.findall(r"\]\(([\w./-]+\.md)\)", text):
        assert (page.parent / link).is_file(), link


def test_every_value_to_set_is_told():
    text = (ROOT / "docs" / "deploy" / "ray-up.md").read_text()
    assert "`SET-`" in text
    for cloud in ("aws", "gcp"):
        assert "SET-" in (ROOT / "deploy" / "ray" / f"{cloud}.yaml").read_text()
