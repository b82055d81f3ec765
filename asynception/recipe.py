"""Recipes: TOML files and command-line overrides to a validated config, with clear errors."""

import difflib
import itertools
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from asynception.config import TrainConfig
from asynception.config_inputs import DEFAULT_MODEL
from asynception.run_files import CONFIG_FILE
from model.errors import InputError
from model.registry import model_setting_names
from worker.data.fetch import is_remote

FACTORY_FILE = "model_factory.py"
"""In a run's folder: the file that `model.factory` named, as it was when the run began."""

DATASET_FILE = "_dataset.py"
"""In a run's folder, after train or val: the file that this setting named, likewise."""

_PATHS = {
    "data": ("train", "val"),
    "model": ("factory", "weights"),
    "training": ("label_weights",),
    "evaluation": ("class_weights", "classes"),
}
"""Settings that name files; relative ones start at the recipe's folder."""


def load_config(recipe: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A recipe, or a run's folder, with `--section.key value` pairs on top.

    Relative paths in a recipe start at the recipe's folder, those in overrides at the working
    directory. Another model than the recipe's takes none of the recipe's model settings over.
    Raises InputError.
    """
    is_run = (recipe / CONFIG_FILE).is_file()
    tree = (
        _anchored(_read_run(recipe), recipe) if is_run else _anchored(_read(recipe), recipe.parent)
    )
    above = _anchored(parse_overrides(overrides), Path())
    config = validate(_merge(_without_model(tree, above), above))
    return config if config.run.name else _named(config, recipe.stem)


def _read_run(folder: Path) -> dict[str, Any]:
    """The config of a run, which is where its folder is now, whatever was moved since."""
    tree = _read(folder / CONFIG_FILE)
    place = Path(os.path.abspath(folder))
    return _merge(tree, {"run": {"storage_path": str(place.parent), "name": place.name}})


def _without_model(tree: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` without its model section if `above` chooses another model."""
    before, after = tree.get("model", {}), above.get("model", {})
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return tree
    chooses = not after.keys().isdisjoint(("name", "factory"))
    other = chooses and _chosen(after) != _chosen(before)
    return {**tree, "model": {}} if other else tree


def _chosen(model: Mapping[str, Any]) -> Any:
    """The factory or the name that a model section settles on."""
    factory = model.get("factory", _NONE)
    return model.get("name", DEFAULT_MODEL) if factory == _NONE else factory


def _anchored(tree: dict[str, Any], start: Path) -> dict[str, Any]:
    """`tree` with absolute paths, relative ones starting at `start`."""
    anchored = dict(tree)
    for section, keys in _PATHS.items():
        settings = tree.get(section)
        if isinstance(settings, dict):
            anchored[section] = settings | _absolute(settings, keys, start)
    return anchored


def _absolute(settings: Mapping[str, Any], keys: Sequence[str], start: Path) -> dict[str, str]:
    paths = {key: settings[key] for key in keys if isinstance(settings.get(key), str)}
    return {
        key: os.path.abspath(start / path)
        for key, path in paths.items()
        if path != _NONE and not is_remote(path)
    }


def _named(config: TrainConfig, stem: str) -> TrainConfig:
    usable = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-") or "run"
    name = f"{usable}-{datetime.now():%Y%m%d-%H%M%S}"
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def _read(recipe: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(recipe.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"recipe {recipe}: {error.strerror}; name a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {recipe} is not valid TOML: {error}") from None


def save_config(config: TrainConfig, folder: Path) -> None:
    """Write the resolved config, atomically, with absolute paths, to be run again.

    The files of a `model.factory` and of data sets of one's own are kept beside it, and named in
    it relative to the folder.
    """
    tree = config.model_dump(mode="json")
    tree["model"] = config.model.model_dump(mode="json", exclude_none=True)
    tree = _anchored(tree, Path())
    if config.model.factory is not None and config.model.factory_source is not None:
        function = config.model.factory.rpartition(":")[2]
        tree["model"] |= {"factory": f"{FACTORY_FILE}:{function}"}
        del tree["model"]["name"]
        _write(folder / FACTORY_FILE, config.model.factory_source)
    for name, read in config.data.functions.items():
        tree["data"] |= {name: f"{name}{DATASET_FILE}:{read.function}"}
        _write(folder / f"{name}{DATASET_FILE}", read.source)
    _write(folder / CONFIG_FILE, tomli_w.dumps(_spelled(tree)))


def _write(path: Path, text: str) -> None:
    incomplete = path.with_name(f".incomplete-{path.name}")
    incomplete.write_text(text, "utf-8")
    os.replace(incomplete, path)


_NONE = "none"
"""How recipes spell None, for which TOML has no word."""


def _spelled(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _spelled(value) if isinstance(value, dict) else _NONE if value is None else value
        for key, value in tree.items()
    }


def _unspelled(annotation: Any, value: Any) -> Any:
    """`value` with None for "none" wherever the settings allow None."""
    if value == _NONE and type(None) in typing.get_args(annotation):
        return None
    if not isinstance(value, Mapping):
        return value
    fields = {name: f for member in _members(annotation) for name, f in member.model_fields.items()}
    return {k: _unspelled(fields[k].annotation, v) if k in fields else v for k, v in value.items()}


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--section.key value` or `--section.key=value`, values as in TOML or else plain strings.

    Raises InputError.
    """
    tree: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option, inline, value = rest.pop(0).partition("=")
        if not option.startswith("--") or "." not in option:
            raise InputError(f"argument {option!r}: expected --section.key value")
        if not inline:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"option {option} needs a value")
            value = rest.pop(0)
        *sections, key = option[2:].split(".")
        _at(tree, sections, option)[key] = _literal(value)
    return tree


def _at(tree: dict[str, Any], sections: Sequence[str], option: str) -> dict[str, Any]:
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise InputError(f"option {option}: {section} was given a value of its own")
    return tree


def _literal(text: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if isinstance(value, date | time) else value  # no setting is a date


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def validate(tree: Mapping[str, Any]) -> TrainConfig:
    """A config from plain values. Raises InputError, one line about the first mistake."""
    try:
        return TrainConfig.model_validate(_unspelled(TrainConfig, tree))
    except ValidationError as error:
        raise InputError(" ".join(_explain(error).split())) from None


def _explain(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    # A mistyped key often makes the right one "missing" too: the typing error says more.
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    in_list = any(isinstance(part, int) for part in first["loc"])
    loc = itertools.takewhile(lambda part: isinstance(part, str), first["loc"])
    key = ".".join(str(part) for part in _without_tags(list(loc)))
    match first["type"]:
        case "extra_forbidden":
            return _explain_unknown(key, first["loc"])
        case "missing" if not in_list:
            return _explain_missing(key)
        case "union_tag_not_found" | "union_tag_invalid":
            return _explain_choice(key, first["ctx"])
        case "value_error":
            return str(first["ctx"]["error"])
    value = repr(first["input"])
    return f"{key} = {value}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _explain_missing(key: str) -> str:
    if "." not in key:
        return f"{key} is missing: the recipe needs a section [{key}]"
    return f"{key} is missing: set it in the recipe or with --{key} VALUE"


def _explain_choice(section: str, context: Mapping[str, str]) -> str:
    """Of a section whose other settings depend on one of its own."""
    key = section + "." + context["discriminator"].strip("'")
    if "tag" not in context:
        return f"{key} is missing: set it beside the other settings of {section}"
    return f"{key} = {context['tag']!r}: choose one of {context['expected_tags']}"


def _explain_unknown(key: str, loc: Sequence[str | int]) -> str:
    known = known_keys()
    if key in known and len(loc) == 1:
        return f'"{key}" in quotes is not a setting: write {key} without them'
    if key in known:  # of another member of the union
        return f"{key} is not a setting of {loc[-2]!r}: remove it"
    leaf = key.rpartition(".")[2]
    namesakes = [each for each in known if each.endswith(f".{leaf}")]
    candidates = known if "." in key else TrainConfig.model_fields
    near = namesakes or difflib.get_close_matches(key, candidates, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else "see asynception train --help"
    return f"{key} is not a known setting; {hint}"


def _without_tags(loc: Sequence[str | int]) -> Iterator[str | int]:
    """Pydantic names the chosen member of a union as if it were a level of the tree."""
    kind: Any = TrainConfig
    for part in loc:
        tags = {_tag(member) for member in _members(kind)}
        if len(tags) > 1 and part in tags:
            kind = next(member for member in _members(kind) if _tag(member) == part)
            continue
        yield part
        fields = [m.model_fields for m in _members(kind)]
        kind = next((f[part].annotation for f in fields if part in f), None)


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that an annotation allows."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for argument in typing.get_args(annotation) for m in _members(argument)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return []


def _tag(member: type[BaseModel]) -> str | None:
    for key in ("kind", "name", "mode"):
        if key in member.model_fields:
            literals = typing.get_args(member.model_fields[key].annotation)
            return literals[0] if literals and isinstance(literals[0], str) else None
    return None


def known_keys() -> list[str]:
    """Every setting as section.key, in the order of the tree, models' own settings included."""
    return list(dict.fromkeys(key for key, _ in describe_settings()))


def describe_settings() -> Iterator[tuple[str, str]]:
    """(section.key, what it does and its default) of every setting."""
    yield from _describe(TrainConfig, "")
    for name in model_setting_names():
        yield f"model.{name}", "a setting of the chosen model"


def _describe(settings: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in settings.model_fields.items():
        members = _members(field.annotation)
        for member in members:
            yield from _describe(member, f"{prefix}{name}.")
        if not members:
            text = " ".join((field.description or "").split())
            shown = _NONE if field.default is None else repr(field.default)
            default = "required" if field.is_required() else f"default {shown}"
            yield f"{prefix}{name}", f"{text} ({default})"
