"""A YAML file and `section.key=value` overrides to plain values of the types that their keys have.

YAML guesses types: `no` is false, 010 is eight, 1:30 is ninety, a date is a date, and 5e-4 is text.
Here everything is read as text, and the key decides: a key of text takes the text unchanged, a key
of a number takes what Python reads as one.
"""

import types
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

NONE = ("null", "Null", "NULL", "~")
TRUE = ("true", "yes", "on")
FALSE = ("false", "no", "off")

Tree = dict[str, Any]
"""Sections of keys, from a file; values are text, or lists of text."""


class BadValue(ValueError):
    """The text is one line: what, where, what would work."""


class _TextLoader(yaml.SafeLoader):
    """Every scalar is text, and a duplicate key is an error."""

    # `<<` stays: it merges mappings and is not a value.
    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines and isinstance(key, yaml.ScalarNode):
                raise BadValue(
                    f"line {line} gives {key.value} again, which line {lines[key.value]} has "
                    "already; keep one"
                )
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def read(path: Path) -> Tree:
    """The sections of a file; one with nothing under it is empty. Raises BadValue, OSError."""
    # Bytes, since YAML itself declares its encoding.
    try:
        tree = yaml.load(path.read_bytes(), _TextLoader)
    except yaml.YAMLError as error:
        raise BadValue(f"it is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise BadValue("it is not a config: it is nested too deeply") from None
    if not isinstance(tree, dict):
        raise BadValue("it must hold sections such as `model:` and `train:`")
    return {section: {} if keys == "" else keys for section, keys in tree.items()}


def override(tree: Tree, text: str, model: type[BaseModel]) -> None:
    """Put `section.key=value` into the tree. Raises BadValue."""
    where, equals, value = text.partition("=")
    section, dot, key = where.partition(".")
    if not equals or not dot or not section or not key:
        raise BadValue(f"override {text!r} must look like section.key=value")
    node = tree.setdefault(section, {})
    if not isinstance(node, dict):
        raise BadValue(f"config section {section} must hold keys, not {node!r}")
    # Only what is in quotes, or no text at all, is YAML: `**/*.jsonl`, `[a]` and `a: b` are names.
    if str in _types(model, section, key) and value[:1] not in ("'", '"'):
        node[key] = value
        return
    try:
        parsed = yaml.load(value, _TextLoader) if value else ""
    except (yaml.YAMLError, RecursionError):
        parsed = None
    if parsed is None:  # broken, or nothing but a comment
        raise BadValue(f"override {text!r}: {value!r} is not a YAML value")
    node[key] = parsed


def typed(tree: Tree, model: type[BaseModel]) -> Tree:
    """The same tree, each text as its key's type where it reads as one. Raises BadValue.

    Otherwise it stays text, for the model to refuse; an empty value is an error, since it comes
    from a variable that is not set.
    """
    result: Tree = {}
    for section, keys in tree.items():
        if not isinstance(keys, dict):
            result[section] = keys
            continue
        result[section] = {}
        for key, value in keys.items():
            kinds = _types(model, section, key)
            if isinstance(value, str) and not value.strip():
                instead = "null for none" if type(None) in kinds else "a value"
                raise BadValue(
                    f"config key {section}.{key}= is empty (a variable that is not set?); give it "
                    f"{instead}, or leave the key out for its default"
                )
            result[section][key] = _typed(value, kinds)
    return result


def _typed(value: Any, kinds: list[Any]) -> Any:
    inner = next((_parts(get_args(k)[1]) for k in kinds if get_origin(k) is dict), None)
    if isinstance(value, dict) and inner is not None:
        return {key: _typed(one, inner) for key, one in value.items()}
    if not isinstance(value, str):
        return value
    if type(None) in kinds and value in NONE:
        return None
    if str in kinds or any(value in get_args(k) for k in kinds if get_origin(k) is Literal):
        return value
    if bool in kinds and value.lower() in TRUE + FALSE:
        return value.lower() in TRUE
    if int in kinds or float in kinds:
        return _number(value, whole=float not in kinds)
    return value


def _number(text: str, whole: bool) -> int | float | str:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return text
    return int(number) if whole and number.is_integer() else number


def _types(model: type[BaseModel], section: str, key: str) -> list[Any]:
    """The types of a key, `int | None` as two; empty for an unknown key."""
    field = model.model_fields.get(section)
    if field is None or not isinstance(field.annotation, type):
        return []
    inner = field.annotation.model_fields.get(key)
    return _parts(inner.annotation) if inner else []


def _parts(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for one in get_args(annotation) for part in _parts(one)]
    return [annotation]
