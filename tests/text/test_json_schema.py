"""Schemas as pydantic, zod and OpenAPI write them: random answers fit them, but for what is named as left out."""

import decimal
import enum
import json
import uuid
from typing import Annotated, Any, Literal

import jsonschema_rs
import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter

from mpillama.errors import UserError
from mpillama.text.constraint import json_schema_grammar
from mpillama.text.json_schema import rewritten, without_looks
from tests.text.test_constraint import answer, grammars_of, write

INTEGER = {"type": "integer", "minimum": 0, "maximum": 99}
HELD: dict[str, dict[str, Any]] = {
    "tuple of an older draft": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array", "items": [INTEGER, {"type": "boolean"}], "additionalItems": False, "minItems": 2,
    },
    "limits of draft 4": {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 5, "exclusiveMaximum": False,
    },
    "names by pattern": {
        "type": "object", "propertyNames": {"pattern": "^[a-c]{1,2}$"}, "additionalProperties": INTEGER,
        "minProperties": 1,
    },
    "names by length": {
        "type": "object", "propertyNames": {"minLength": 2, "maxLength": 3}, "additionalProperties": INTEGER,
    },
    "names listed": {
        "type": "object", "propertyNames": {"type": "string", "enum": ["a", "b"]}, "additionalProperties": INTEGER,
        "required": ["a"],
    },
    "names by reference": {
        "$defs": {"Color": {"enum": ["red", "blue"], "title": "Color"}},
        "type": "object", "propertyNames": {"$ref": "#/$defs/Color"}, "additionalProperties": {"type": "null"},
    },
    "no other names": {"type": "object", "propertyNames": False},
    "unevaluated": {
        "type": "object", "properties": {"a": INTEGER}, "required": ["a"], "unevaluatedProperties": False,
    },
    "unevaluated items": {"type": "array", "prefixItems": [INTEGER], "minItems": 1, "unevaluatedItems": False},
    "never": {"anyOf": [{"not": {}}, INTEGER], "description": "zod's union with never"},
    "no property": {"type": "object", "properties": {"a": {"not": {}}, "b": INTEGER}, "additionalProperties": False},
    "dynamic": {
        "$dynamicAnchor": "node", "type": "object", "properties": {"next": {"$dynamicRef": "#node"}, "v": INTEGER},
        "required": ["v"], "additionalProperties": False,
    },
    "const": {"const": "42"},
    "components": {
        "components": {"schemas": {"Pet": {"type": "array", "items": [INTEGER], "additionalItems": False}}},
        "$ref": "#/components/schemas/Pet",
    },
    "discriminator": {
        "discriminator": {"propertyName": "kind", "mapping": {"a": "#/$defs/a", "b": "#/$defs/b"}},
        "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        "$defs": {
            kind: {
                "type": "object", "properties": {"kind": {"const": kind}, "v": INTEGER}, "required": ["kind", "v"],
                "additionalProperties": False,
            }
            for kind in "ab"
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_what_can_be_held_in_other_words_is_held(name):
    valid = jsonschema_rs.validator_for(HELD[name], validate_formats=True)
    assert not rewritten(HELD[name]).weakened
    for seed in range(8):
        text = answer("toy", json_schema_grammar(HELD[name]), seed)
        assert valid.is_valid(json.loads(text)), text


WEAKENED = {
    "uniqueItems": {"type": "array", "items": INTEGER, "uniqueItems": True},
    "contains": {"type": "array", "items": INTEGER, "contains": {"const": 7}, "minContains": 2},
    "not": {"type": "integer", "not": {"const": 7}},
    "if": {"type": "integer", "if": {"minimum": 5}, "then": {"multipleOf": 2}, "else": {"multipleOf": 3}},
    "dependentRequired": {"type": "object", "properties": {"a": INTEGER}, "dependentRequired": {"a": ["b"]}},
    "dependencies": {"type": "object", "properties": {"a": INTEGER}, "dependencies": {"a": ["b"]}},
    "unevaluatedProperties": {
        "allOf": [{"type": "object", "properties": {"a": INTEGER}}], "unevaluatedProperties": False,
    },
    "propertyNames": {"type": "object", "properties": {"a": INTEGER}, "propertyNames": {"format": "email"}},
    "pattern": {"type": "string", "pattern": r"^(?!x)\b[a-z]{2}$"},
    "format (password)": {"type": "string", "format": "password"},
    "format (uuid4)": {"type": "string", "format": "uuid4"},
    "minimun": {"type": "integer", "minimun": 3},
    "required": {"type": "object", "properties": {"a": {"type": "integer", "required": True}}},
}  # fmt: skip


@pytest.mark.parametrize("word", WEAKENED)
def test_a_word_that_cannot_be_held_is_named_and_the_rest_is_held(word):
    schema = WEAKENED[word]
    assert any(place.endswith(f"/{word}") for place in rewritten(schema).weakened), rewritten(schema).weakened
    kind = jsonschema_rs.validator_for({"type": schema.get("type", "object")})
    for seed in range(4):
        assert kind.is_valid(json.loads(answer("toy", json_schema_grammar(schema), seed)))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "enum": ["a"], "nullable": True},
        {"const": 3, "nullable": True},
        {"anyOf": [{"type": "boolean"}, {"type": "integer"}], "nullable": True},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "boolean"}}, "nullable": True},
        {"allOf": [{"type": "boolean"}], "nullable": True},
    ],
)
def test_what_is_nullable_may_be_null(schema):
    assert write("toy", json_schema_grammar(schema), "null").finished
    assert {answer("toy", json_schema_grammar(schema), seed) for seed in range(40)} != {"null"}
    with pytest.raises(UserError):
        write("toy", json_schema_grammar({**schema, "nullable": False}), "null")


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]
    owner: "Dog | None" = None


class Everything(BaseModel):
    """What pydantic writes words for that grammars do not know."""

    model_config = ConfigDict(extra="forbid")

    tags: set[Literal["x", "y"]]
    pair: tuple[int, bool]
    prices: dict[Color, bool]
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    secret: SecretStr
    identity: uuid.UUID
    amount: decimal.Decimal
    data: bytes


def test_a_schema_of_pydantic_is_never_refused_and_its_answers_are_taken():
    schema = TypeAdapter(Everything).json_schema()
    assert {"uniqueItems", "propertyNames", "discriminator"} <= set(words(schema))
    for seed in range(6):
        found = json.loads(answer("toy", json_schema_grammar(schema), seed))
        found["amount"] = "1.5"  # the one place where something is left out: its pattern looks ahead
        Everything.model_validate_json(json.dumps(found))


def words(value: Any) -> list[str]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*(value if isinstance(value, dict) else ()), *(word for part in inside for word in words(part))]


ZOD_EMAIL = (
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
)  # fmt: skip


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "email", "pattern": ZOD_EMAIL},
        {"type": "string", "format": "uri"},
        {"type": "string", "format": "cidrv4", "pattern": r"^((25[0-5]|\d)\.){3}\d\/([0-9]|[1-2][0-9])$"},
        {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": INTEGER},
        {"type": "integer", "exclusiveMinimum": 0, "maximum": 9007199254740991},
        {"oneOf": [{"type": "number"}, {"type": "integer"}]},
        {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1},
        {"type": "string", "format": "date-time", "pattern": r"^\d{4}-\d\d-\d\dT.*Z$"},
    ],
)
def test_a_schema_of_zod_is_never_refused(schema):
    grammars_of("toy").check(json_schema_grammar(schema))


@pytest.mark.parametrize(
    ("pattern", "plain"),
    [
        ("^(?!a)b$", "^b$"), ("(?=a(b|c(?!d)))e", "e"), (r"(?<!\()x", "x"), ("(?<name>a)", "(?<name>a)"),
        ("[(?=]a", "[(?=]a"), (r"\(?=a", r"\(?=a"), (r"\ba\B", "a"), (r"[\b]a", r"[\b]a"), ("(?:a)(?=[)]b)c", "(?:a)c"),
        ("a\\", "a\\"), ("", ""), ("(?!", ""),
    ],
)  # fmt: skip
def test_looks_are_taken_out_of_patterns_and_nothing_else(pattern, plain):
    assert without_looks(pattern) == plain


def test_the_schema_that_was_given_is_not_changed():
    schema = {"type": "array", "items": [{"nullable": True, "type": "string"}], "uniqueItems": True}
    before = json.dumps(schema)
    rewritten(schema)
    assert json.dumps(schema) == before


@pytest.mark.parametrize("reference", ["#/nowhere", "#/$defs/x/y", "#/items/9", "https://example.com/x", 5])
def test_a_reference_to_nothing_is_refused(reference):
    with pytest.raises(UserError):
        grammars_of("toy").check(json_schema_grammar({"$ref": reference, "$defs": {"x": {}}}))
