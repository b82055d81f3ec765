"""Reference pages that follow from the code: every setting, and every command with its options."""

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from asynception.cli import main
from asynception.config import TrainConfig
from asynception.sizing import UPDATE_S_PER_BYTE, traffic

SETTINGS_HEAD = """# Settings

Every setting of a recipe, with its default. In a recipe `key` stands below `[section]`; on the
command line it is `--section.key value`. `none` stands for no value. `asynception info RECIPE`
shows what a recipe comes to. A model's own settings (`[model]`) are on the page on
[models](../models.md).
"""
COMMANDS_HEAD = """# Commands

What `--help` says, without the list of settings that `train`, `info` and others append to it
([settings](settings.md)).
"""
WIDTH = 100
ESCAPES = str.maketrans({mark: f"\\{mark}" for mark in "|<*"})


def write(folder: Path) -> None:
    """Write the pages, where they have changed, into `folder`."""
    pages = {
        "settings.md": settings_page(),
        "commands.md": commands_page(),
        "sizing_table.md": sizing_table(),
    }
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def settings_page() -> str:
    """All sections of the config tree as tables, in Markdown."""
    parts = [SETTINGS_HEAD]
    for name, field in TrainConfig.model_fields.items():
        parts += _sections(name, field)
    return "\n".join(parts)


def _sections(name: str, field: FieldInfo) -> Iterator[str]:
    """A field's table, or one for each class to choose from, and then those that lie in it."""
    members = list(_members(field.annotation))
    for settings in members:
        yield _section(name, settings, len(members) > 1)
        for key, inner in settings.model_fields.items():
            yield from _sections(f"{name}.{key}", inner)


def _members(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings that a field may hold: one class, or several to choose from."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        for argument in typing.get_args(annotation):
            yield from _members(argument)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _section(name: str, settings: type[BaseModel], is_choice: bool) -> str:
    tag, title = _tag(settings) if is_choice else "", f"[{name}]"
    if tag:
        title += f" {tag} = {_shown(settings.model_fields[tag].default)}"
    purpose = " ".join((settings.__doc__ or "").split()).replace("*", r"\*")
    is_own = settings.__doc__ is not None and settings.__doc__ != BaseModel.__doc__
    lines = [f"## {title}", "", *([purpose, ""] if is_own else [])]
    lines += ["| setting | type | default | |", "|---|---|---|---|"]
    lines += [
        f"| `{name}.{key}` | {_kind(field)} | {_default(field)} | {_text(field)} |"
        for key, field in settings.model_fields.items()
        if key != tag and not list(_members(field.annotation))
    ]
    return "\n".join([*lines, ""])


def _tag(settings: type[BaseModel]) -> str:
    """The key whose one value chooses this class among others."""
    fields = settings.model_fields.items()
    return next((key for key, f in fields if len(typing.get_args(f.annotation)) == 1), "")


def _text(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).translate(ESCAPES)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return f"`{_shown(default)}`"


def _shown(value: Any) -> str:
    """As a recipe spells it."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case dict():
            inside = ", ".join(f"{key} = {_shown(each)}" for key, each in value.items())
            return f"{{ {inside} }}" if inside else "{}"
        case tuple() | list():
            return f"[{', '.join(map(_shown, value))}]"
    return str(value)


def _kind(field: FieldInfo) -> str:
    kinds = dict.fromkeys(_kinds(field.annotation))
    return " or ".join(kinds)


def _kinds(annotation: Any) -> Iterator[str]:
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Literal:
        yield from (f"`{_shown(choice)}`" for choice in arguments)
    elif origin is Annotated:
        yield from _kinds(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _kinds(argument)
    elif annotation is type(None):
        yield "`none`"
    elif origin is not None:
        inside = ", ".join(" or ".join(_kinds(each)) for each in arguments if each is not ...)
        yield f"{'table' if origin is dict else 'list'} of {inside}"
    else:
        yield {"str": "string", "bool": "true or false"}.get(
            annotation.__name__, annotation.__name__
        )


MODELS = (
    ("Xception, 1,000 classes", 22_855_952),
    ("Xception, 17,000 classes", 55_639_952),
    ("Xception, 2 x 4096, 17,000 classes", 115_629_968),
)
NETWORKS_GBIT = (10.0, 25.0, 100.0)
WORKERS = (8, 60)
SERVER_CORES = 4.0


def sizing_table() -> str:
    """Servers for the paper's models, with gradients of half a second."""
    head = ["model", "workers", *(f"servers at {gbit:g} Gbit/s" for gbit in NETWORKS_GBIT)]
    rows = [head, ["---"] * len(head)]
    for model, num_parameters in MODELS:
        for num_workers in WORKERS:
            cells = [_servers(num_parameters, num_workers, gbit) for gbit in NETWORKS_GBIT]
            rows.append([model, str(num_workers), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _servers(num_parameters: int, num_workers: int, gbit: float) -> str:
    """Their number, and what all workers push."""
    num_bytes, network = 4 * num_parameters, gbit * 1e9 / 8
    of_all = traffic(num_bytes, num_bytes, num_bytes * UPDATE_S_PER_BYTE, 0.5, num_workers, network)
    return f"{of_all.num_servers(SERVER_CORES, network)} ({of_all.pushes_per_s:.0f} pushes/s)"


def commands_page() -> str:
    """The help of every command, in Markdown."""
    parts = [COMMANDS_HEAD]
    for path, command in _commands(main, ("asynception",)):
        parts.append(f"## {' '.join(path)}\n\n```text\n{_help(path, command)}\n```\n")
    return "\n".join(parts)


def _commands(
    group: click.Group, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


def _help(path: tuple[str, ...], command: click.Command) -> str:
    context = click.Context(command, info_name=" ".join(path), max_content_width=WIDTH)
    context.terminal_width = WIDTH
    formatter = context.make_formatter()
    command.format_usage(context, formatter)
    command.format_help_text(context, formatter)
    command.format_options(context, formatter)
    return formatter.getvalue().rstrip()
