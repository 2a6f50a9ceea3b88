"""JSON schemas as people and libraries write them, rewritten into the words that the grammars keep to.

What a grammar cannot hold is left out: the answer then fits the schema but for that word, which `Rewritten.weakened`
names. Words that say nothing about a value are left out as well, and so is what JSON Schema does not know.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mpillama.errors import UserError

Schema = dict[str, Any]

ONE_SCHEMA = ("items", "additionalProperties")
SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
VALUES = (
    "$ref", "type", "enum", "const", "required", "minLength", "maxLength", "pattern", "format", "minItems", "maxItems",
    "minProperties", "maxProperties",
)  # fmt: skip
NAMES = ("$id", "id", "$anchor")
HELD = frozenset((*ONE_SCHEMA, *SCHEMA_LISTS, *SCHEMA_MAPS, *LIMITS, *VALUES, *NAMES))
NOTES = frozenset(
    ["title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
     "$schema", "$vocabulary", "contentEncoding", "contentMediaType", "contentSchema", "discriminator", "xml",
     "externalDocs"]
)  # fmt: skip
"""What says nothing about a value. A discriminator names the property by which the schemas of a oneOf differ."""

FORMATS = frozenset(["date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"])
LIKE_FORMATS = {"guid": "uuid", "url": "uri"} | {f"uuid{version}": "uuid" for version in range(1, 9)}
"""Formats that are, or are nearly, those of other names."""
BESIDES = frozenset(["$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "not"])
"""Words whose schemas may know properties and items of the object beside them."""

MOST_CHARACTERS = 1 << 20
MOST_OPTIONAL = 1000
"""Optional properties of an object: any of them may be the next one, which the grammar notes at each name."""


@dataclass
class Rewritten:
    """A schema that grammars keep to, and what it does not say any more: each word with its place."""

    schema: Schema
    weakened: list[str] = field(default_factory=list)


def rewritten(schema: Any) -> Rewritten:
    """Rewrite a schema, which is not changed; UserError for what is none, or what no grammar can hold."""
    if not isinstance(schema, dict):
        raise UserError("The JSON schema is wrong at the top: not a schema; correct it.")
    return _Rewriting(_copy(schema)).run()


def _copy(schema: Schema) -> Schema:
    try:
        text = json.dumps(schema, allow_nan=False)
        _check_length(text)
        copy: Schema = json.loads(text)
    except (RecursionError, TypeError, ValueError) as error:
        raise UserError(f"The JSON schema cannot be written as JSON ({error}); correct it.") from error
    return copy


def _check_length(text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"The JSON schema is too large: {len(text)} characters, at most {MOST_CHARACTERS}; shorten it.")


class _Rewriting:
    """Rewrites a schema in place: references stay what they are, and so must the places they name."""

    def __init__(self, schema: Schema):
        self._found = Rewritten(schema)
        # A list of what is to do, not recursion: a request may be nested as deep as it likes.
        self._waiting: list[tuple[str, Any]] = [("", schema)]
        self._seen: set[int] = set()

    def run(self) -> Rewritten:
        while self._waiting:
            place, part = self._waiting.pop()
            if isinstance(part, dict):
                if id(part) not in self._seen:
                    self._seen.add(id(part))
                    self._rewrite(part, place)
            elif not isinstance(part, bool):
                raise UserError(f"The JSON schema is wrong at {place or 'the top'}: not a schema; correct it.")
        return self._found

    def _rewrite(self, schema: Schema, place: str) -> None:
        for step in (
            _follow_dynamic, _read_older_drafts, _allow_null, self._name_properties, self._close, self._simplify_texts
        ):  # fmt: skip
            step(schema, place)
        self._drop(schema, place)
        _check_optional(schema, place)
        self._waiting += self._inner(schema, place)

    def _weaken(self, place: str, word: str) -> None:
        self._found.weakened.append(f"{place}/{word}")

    def _name_properties(self, schema: Schema, place: str) -> None:
        """Turn propertyNames into properties or patterns, where nothing else speaks of names."""
        names = schema.pop("propertyNames", True)
        if names is True or names == {} or not isinstance(names, dict):
            if names is False:
                schema |= {"properties": {}, "additionalProperties": False}
            return
        names, value = self._target(names), schema.get("additionalProperties", True)
        listed = [names["const"]] if "const" in names else names.get("enum")
        if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
            known = schema.get("properties") or {}
            schema["properties"] = known | {name: value for name in listed if name not in known}
            schema["additionalProperties"] = False
        elif (pattern := _pattern_of(names)) and not schema.get("patternProperties") and value is not False:
            schema["patternProperties"] = {pattern: value}
            schema["additionalProperties"] = False
        elif set(names) - NOTES - {"type"}:
            self._weaken(place, "propertyNames")

    def _close(self, schema: Schema, place: str) -> None:
        """Take unevaluated… for additional…, where no other schema speaks of the same object."""
        for word, same in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
            value = schema.pop(word, True)
            if value is True or same in schema:
                continue
            if BESIDES & set(schema):
                self._weaken(place, word)
            else:
                schema[same] = value

    def _simplify_texts(self, schema: Schema, place: str) -> None:
        """Leave out formats that are not known, and what looks around in patterns."""
        name = schema.get("format")
        if isinstance(name, str):
            schema["format"] = LIKE_FORMATS.get(name, name)
            if schema["format"] not in FORMATS:
                del schema["format"]
            if schema.get("format") != name:
                self._weaken(place, f"format ({name})")
        if isinstance(pattern := schema.get("pattern"), str) and (plain := without_looks(pattern)) != pattern:
            schema["pattern"] = plain
            self._weaken(place, "pattern")
        if isinstance(patterns := schema.get("patternProperties"), dict):
            schema["patternProperties"] = {without_looks(pattern): value for pattern, value in patterns.items()}

    def _drop(self, schema: Schema, place: str) -> None:
        for word in [word for word in schema if word not in HELD]:
            value = schema.pop(word)
            if word == "components":  # OpenAPI's place for what is referred to
                schema[word] = value
            elif word == "uniqueItems" and value is False:
                continue
            elif word not in NOTES and not word.startswith("x-"):
                self._weaken(place, word)
        if isinstance(schema.get("required"), bool):  # as in draft 3
            del schema["required"]
            self._weaken(place, "required")

    def _inner(self, schema: Schema, place: str) -> Iterator[tuple[str, Any]]:
        """The schemas directly inside, and what is referred to, each with its place."""
        for word in [*ONE_SCHEMA, *SCHEMA_LISTS, *SCHEMA_MAPS]:
            value = schema.get(word)
            if word in ONE_SCHEMA and value is not None:
                schema[word] = _or_nothing(value)
                yield f"{place}/{word}", schema[word]
            elif isinstance(value, list):
                value[:] = map(_or_nothing, value)
                yield from ((f"{place}/{word}/{index}", part) for index, part in enumerate(value))
            elif isinstance(value, dict):
                value.update({name: _or_nothing(part) for name, part in value.items()})
                yield from ((f"{place}/{word}/{name}", part) for name, part in value.items())
        target = self._resolve(schema.get("$ref"))
        if isinstance(target, dict):
            yield str(schema["$ref"]).removeprefix("#"), target

    def _target(self, schema: Schema) -> Schema:
        """A schema, or what it refers to."""
        target = self._resolve(schema.get("$ref"))
        return target if isinstance(target, dict) else schema

    def _resolve(self, reference: Any) -> Any:
        """What a reference within the document names; None if nothing."""
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return None
        part: Any = self._found.schema
        for step in reference[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(part, dict) and step in part:
                part = part[step]
            elif isinstance(part, list) and step.isdecimal() and int(step[:9]) < len(part):
                part = part[int(step[:9])]
            else:
                return None
        return part


def _follow_dynamic(schema: Schema, place: str) -> None:
    """A document by itself has nothing that is dynamic."""
    for word, plain in (("$dynamicRef", "$ref"), ("$recursiveRef", "$ref"), ("$dynamicAnchor", "$anchor")):
        if word in schema:
            schema.setdefault(plain, schema.pop(word))
    schema.pop("$recursiveAnchor", None)


def _read_older_drafts(schema: Schema, place: str) -> None:
    """Write in the words of 2020-12: lists of items, and limits that say with a boolean whether they are taken."""
    more = schema.pop("additionalItems", None)
    if isinstance(schema.get("items"), list):
        schema.setdefault("prefixItems", schema.pop("items"))
        if more is not None:
            schema["items"] = more
    for limit, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(schema.get(exclusive), bool) and schema.pop(exclusive) and limit in schema:
            schema[exclusive] = schema.pop(limit)


def _allow_null(schema: Schema, place: str) -> None:
    """OpenAPI's nullable."""
    if schema.pop("nullable", False) is not True:
        return
    kind, null = schema.get("type"), {"type": "null"}
    if kind is not None:
        schema["type"] = [*(kind if isinstance(kind, list) else [kind]), "null"]
    if "const" in schema:
        schema["enum"] = [schema.pop("const")]
    if isinstance(schema.get("enum"), list) and None not in schema["enum"]:
        schema["enum"] = [*schema["enum"], None]
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            schema[word] = [*schema[word], null]
    for word in ("$ref", "allOf"):
        if word in schema and "anyOf" not in schema:
            schema["anyOf"] = [{word: schema.pop(word)}, null]


def _or_nothing(schema: Any) -> Any:
    """A schema; False for what zod and pydantic write for "never"."""
    return False if isinstance(schema, dict) and schema.get("not") in ({}, True) and "not" in schema else schema


def _pattern_of(names: Schema) -> str | None:
    """The pattern of a schema for names of properties; None if that is not all it says."""
    says = set(names) - NOTES - {"type"}
    if says == {"pattern"} and isinstance(names["pattern"], str):
        return without_looks(names["pattern"])
    if says and says <= {"minLength", "maxLength"}:
        return f"^(?s:.){{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
    return None


def _check_optional(schema: Schema, place: str) -> None:
    """UserError for an object with more optional properties than a grammar can choose among."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict):
        return
    always = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    optional = len(properties.keys() - always)
    if optional > MOST_OPTIONAL:
        raise UserError(
            f"The JSON schema has {optional} optional properties at {place}/properties, of which a grammar can hold "
            f"{MOST_OPTIONAL}: make more of them required, or divide the object."
        )


LOOKS = frozenset(["(?=", "(?!", "(?<=", "(?<!"])
EDGES = frozenset([r"\b", r"\B"])
TOKENS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\(\?<?[=!]|.", re.DOTALL)
"""Of a regular expression: what is escaped, classes of characters, what opens a look around, anything else."""


def without_looks(pattern: str) -> str:
    r"""A regular expression without what only looks around ((?=…), (?!…), (?<=…), (?<!…), \b, \B): it fits more."""
    kept, depth = [], 0
    for token in TOKENS.findall(pattern):
        if depth:
            depth += token.startswith("(") - (token == ")")
        elif token in LOOKS:
            depth = 1
        elif token not in EDGES:
            kept.append(token)
    return "".join(kept)
