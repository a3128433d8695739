"""Typed configurations: YAML in, frozen objects out, every mistake in one report with its remedy.

A :class:`Spec` is a pydantic model that is frozen and refuses unknown keys. :class:`Choice` is a field whose ``type``
names the class, built in or ``pkg.mod:Class``. The rest is loading: ``base:`` inheritance, ``key=value`` overrides,
did-you-mean.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError, core_schema

from diffalign.errors import ConfigError


class Spec(BaseModel):
    """A frozen configuration object; the string under a field is its documentation everywhere."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


def read_with(spec: Spec, setting: str, reader: str, *keys: str) -> None:
    """Refuse ``keys`` of a section that are set where only ``setting: reader`` reads them.

    Raises:
        ValueError: one is, by its value: a resolved configuration names every key.
    """
    for key in keys:
        if getattr(spec, setting) != reader and getattr(spec, key) != type(spec).model_fields[key].default:
            raise ValueError(f"{key} is read with {setting}: {reader} alone: set that, or drop {key}")


S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class _Options:
    """Marks a field whose values a Choice knows, without being its validator."""

    choice: Choice


class Choice:
    """Annotation of a field that holds one of several Specs: ``Annotated[Base, Choice(Base, {"name": Class, ...})]``.

    The value is an instance, or a mapping whose ``type`` is a name of the table, an alias, or ``pkg.mod:Class``.
    """

    def __init__(self, base: type[Spec], options: Mapping[str, type[Spec]], aliases: Mapping[str, str] | None = None) -> None:
        self.base, self.options, self.aliases = base, dict(options), dict(aliases or {})

    def one_or_more(self) -> Any:
        """A field type that takes one value or a list of them and holds a tuple; one is written back as one."""
        held: Any = GenericAlias(tuple, (self.base, ...))
        many: TypeAdapter[tuple[Spec, ...]] = TypeAdapter(tuple[Annotated[self.base, self], ...])  # type: ignore[name-defined]

        def read(value: Any) -> Any:
            if isinstance(value, list | tuple):
                if not value:
                    raise PydanticCustomError("choice", "must not be empty")
                return many.validate_python(value)
            return (self.validate(value),)

        def write(values: tuple[Spec, ...]) -> Any:
            out = [self.serialize(v) for v in values]
            return out[0] if len(out) == 1 else out

        schema = {"anyOf": [one := self.json_schema(), {"type": "array", "items": one, "minItems": 1}]}
        return Annotated[held, PlainValidator(read), PlainSerializer(write), WithJsonSchema(schema), _Options(self)]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate,
            serialization=core_schema.plain_serializer_function_ser_schema(self.serialize),
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return self.json_schema()

    def json_schema(self) -> dict[str, Any]:
        """One schema per built-in class, and any import path."""
        own = {"type": "object", "properties": {"type": {"type": "string", "pattern": ":"}}, "required": ["type"]}
        return {"anyOf": [*(cls.model_json_schema() | {"required": ["type"]} for cls in self.options.values()), own]}

    def resolve(self, name: Any) -> type[Spec]:
        """The class behind a ``type``; raises ValueError with the names that exist."""
        name = self.aliases.get(name, name)
        if isinstance(name, str) and name in self.options:
            return self.options[name]
        if isinstance(name, str) and ":" in name:
            return self._import(name)
        known = [*self.options, *self.aliases]
        raise ValueError(f"unknown type {name!r}{did_you_mean(str(name), known)}; known: {', '.join(known)}, or pkg.mod:Class")

    def _import(self, name: str) -> type[Spec]:
        module, _, attribute = name.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as e:
            raise ValueError(f"cannot import {name!r}: {e}") from e
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ValueError(f"{name!r} is not a subclass of diffalign's {self.base.__name__}")
        return cls

    def validate(self, value: Any) -> Spec:
        if isinstance(value, self.base):
            return value
        if not isinstance(value, Mapping) or "type" not in value:
            raise PydanticCustomError(
                "choice",
                "must be a mapping with the key 'type', such as {example}",
                {"example": f"type: {next(iter(self.options))}"},
            )
        try:
            cls = self.resolve(value["type"])
        except ValueError as e:
            raise PydanticCustomError("choice_type", "{reason}", {"reason": str(e)}) from e
        keys = {k: v for k, v in value.items() if k != "type"}
        return cls.model_validate(keys)

    def serialize(self, value: Spec) -> dict[str, Any]:
        """The mapping that :meth:`validate` reads back, with the name or import path of the class as ``type``."""
        cls = type(value)
        name = next((n for n, c in self.options.items() if c is cls), f"{cls.__module__}:{cls.__qualname__}")
        return {"type": name} | {k: v for k, v in value.model_dump(mode="json").items() if k != "type"}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (``1e-5`` is one) and booleans (``no`` is none), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"key {key!r} stands twice, line {key_node.start_mark.line + 1}", hint="keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+0123456789.")
)
# Of YAML 1.1's booleans only 1.2's: no and on are words here. Where a switch is asked for, pydantic reads them as one.
_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != _BOOL]
    for first, found in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document; errors name ``where``."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a subclass of SafeLoader
    except ConfigError as e:
        raise ConfigError(f"{where}: {e.message}", hint=e.hint) from e
    except yaml.YAMLError as e:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(e).split())}") from e


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; ``base:`` names one file or a list, relative to this one, that it inherits from."""
    return _load(Path(path), ())


def _load(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise ConfigError(f"{path}: 'base' leads back to this file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the configuration {path}: {getattr(e, 'strerror', None) or e}") from e
    data = parse_yaml(text, str(path))
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of keys, not a {type(data).__name__}")
    bases = data.pop("base", [])
    out: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        out = merge(out, _load(path.parent / base, (*above, path.resolve())))
    return merge(out, data)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, section by section. A section whose ``type`` changes starts empty: no stale keys."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            retyped = "type" in old and "type" in value and old["type"] != value["type"]
            out[key] = dict(value) if retyped else merge(old, value)
        else:
            out[key] = value
    return out


def parse_override(text: str) -> dict[str, Any]:
    """``train.learning_rate=1e-5`` as a nested mapping; the value is YAML. ``--a.b=c`` is read alike."""
    key, sep, value = text.partition("=")
    path = key.removeprefix("--").split(".")
    if not sep or not all(re.fullmatch(r"[A-Za-z_][\w-]*", part) for part in path):
        raise ConfigError(f"cannot read the override {text!r}", hint="write key=value, such as train.learning_rate=1e-5")
    out: Any = parse_yaml(value, f"override {key}")
    for part in reversed(path):
        out = {part: out}
    return out


def with_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply ``key=value`` strings in order. An override of a ``type`` drops the other keys of that section first."""
    out = dict(data)
    parsed = [parse_override(o) for o in overrides]
    # types first, so that `objective.beta=1 objective.type=x` does not depend on the order
    for one in sorted(parsed, key=lambda p: not _sets_type(p)):
        out = merge(out, one)
    return out


def _sets_type(nested: Any) -> bool:
    while isinstance(nested, Mapping) and len(nested) == 1:
        key, nested = next(iter(nested.items()))
        if key == "type":
            return True
    return False


def validate(cls: type[S], data: Mapping[str, Any], where: str = "configuration") -> S:
    """Build a Spec, or raise one :class:`ConfigError` that lists every mistake."""
    try:
        return cls.model_validate(dict(data))
    except ValidationError as e:
        lines = [_explain(cls, err) for err in e.errors(include_url=False)]
        n = len(lines)
        raise ConfigError(f"{where}: {n} mistake{'s' if n > 1 else ''}\n" + "\n".join(f"  {line}" for line in lines)) from None


def load(cls: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """A YAML file with overrides as a validated Spec."""
    return validate(cls, with_overrides(load_yaml(path), overrides), str(path))


def load_config(cls: type[S], first: str | None, overrides: Sequence[str]) -> S:
    """A config file with overrides, a run directory's resolved config, or overrides alone."""
    if first is None:
        return validate(cls, with_overrides({}, overrides), "command line")
    path = Path(first)
    if path.is_dir():
        path = path / "config.resolved.yaml"
    return load(cls, path, overrides)


def dump(spec: Spec) -> str:
    """A Spec as YAML that loads to an equal Spec."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _explain(cls: type[Spec], err: Any) -> str:
    loc = [str(part) for part in err["loc"]]
    key = ".".join(loc)
    if err["type"] == "extra_forbidden":
        return f"{key}: unknown key{did_you_mean(loc[-1], _keys_at(cls, loc[:-1]))}"
    if err["type"] == "missing":
        return f"{key}: missing, and it has no default"
    message = err["msg"].removeprefix("Value error, ")
    shown = err.get("input")
    small = isinstance(shown, str | int | float | list | None) and len(repr(shown)) < 80
    return (f"{key}: " if key else "") + message + (f" (got {shown!r})" if small and err["type"] != "choice_type" else "")


def _keys_at(cls: type[Spec], loc: Sequence[str]) -> list[str]:
    """Names that are valid at ``loc``, as far as the annotations tell."""
    found: list[type[Spec]] = [cls]
    for part in loc:
        step: list[type[Spec]] = []
        for c in found:
            if part in c.model_fields:
                field = c.model_fields[part]
                step += _specs_in(field.annotation)
                for m in field.metadata:
                    choice = m.choice if isinstance(m, _Options) else m
                    step += choice.options.values() if isinstance(choice, Choice) else []
        found = step or found
    return sorted({name for c in found for name in c.model_fields})


def _specs_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    if get_origin(annotation) is Annotated:
        inner, *meta = get_args(annotation)
        return _specs_in(inner) + [o for m in meta if isinstance(m, Choice) for o in m.options.values()]
    return [s for a in get_args(annotation) for s in _specs_in(a)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Words that suggest a near one of ``known``; nothing where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def differences(a: Spec, b: Spec) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) of every leaf that differs."""

    def walk(x: Any, y: Any, path: str) -> list[tuple[str, Any, Any]]:
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            return [d for k in dict.fromkeys([*x, *y]) for d in walk(x.get(k), y.get(k), f"{path}.{k}" if path else str(k))]
        return [] if x == y else [(path, x, y)]

    return walk(a.model_dump(mode="json"), b.model_dump(mode="json"), "")
