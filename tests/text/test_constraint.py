"""A model of random logits under a grammar: what it says always parses and fits."""

import builtins
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import jsonschema_rs
import numpy as np
import pytest
import tokenizers

from mpillama.errors import UserError
from mpillama.text.constraint import (
    MOST_KEPT,
    Constraint,
    Grammars,
    json_object_grammar,
    json_rule,
    json_schema_grammar,
    text_rule,
    token_rule,
)
from mpillama.text.tokenizer import Tokenizer
from tests.text import vocabularies
from tests.tiny_models import EOS as TOY_END
from tests.tiny_models import toy_tokenizer

PADDING = 37
MOST_TOKENS = 3000


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "toy":
        return Tokenizer(toy_tokenizer(), bos_token_id=0, eos_token_ids=(TOY_END,), add_bos=False)
    source = vocabularies.sentencepiece() if kind == "sentencepiece" else vocabularies.byte_level((), False)
    names = ("</s>", vocabularies.USER) if kind == "sentencepiece" else (vocabularies.END, vocabularies.USER)
    ends = tuple(source.token_to_id(name) for name in names)
    return Tokenizer(source.to_str().encode(), bos_token_id=None, eos_token_ids=ends, add_bos=False)


@cache
def grammars_of(kind: str) -> Grammars:
    return Grammars(tokenizer_of(kind), size_of(kind))


def size_of(kind: str) -> int:
    return tokenizer_of(kind).vocab_size + PADDING


@cache
def bias_of(kind: str) -> np.ndarray:
    """A liking for what closes strings and lists, so that random answers end."""
    tokenizer = tokenizer_of(kind)
    texts = [tokenizer.decode([token]) for token in range(size_of(kind))]
    return np.array([4.0 if any(char in text for char in '"}]') else 0.0 for text in texts], np.float32)


def babble(kind: str, constraint: Constraint, seed: int) -> Iterator[int]:
    """Tokens of a random model, without the one that ends its answer."""
    rng = np.random.default_rng(seed)
    for _ in range(MOST_TOKENS):
        if constraint.finished:
            return
        logits = (rng.gumbel(size=size_of(kind)) + bias_of(kind)).astype(np.float32)
        token = int(np.argmax(constraint.masked(logits)))
        constraint.accept(token)
        if token in tokenizer_of(kind).eos_token_ids:
            assert constraint.finished
            return
        yield token
    raise AssertionError("no end")


def answer(kind: str, grammar: str, seed: int) -> str:
    constraint = grammars_of(kind).constraint(grammar)
    return tokenizer_of(kind).decode(babble(kind, constraint, seed), skip_special=False)


def write(kind: str, grammar: str, text: str) -> Constraint:
    """Say `text` under `grammar`, with the ids that the tokenizer gives it; UserError if it is not allowed."""
    constraint = grammars_of(kind).constraint(grammar)
    go_on(kind, constraint, text)
    return constraint


def go_on(kind: str, constraint: Constraint, text: str) -> None:
    for token in ids_inside(kind, text):
        if np.isneginf(constraint.masked(np.zeros(size_of(kind), np.float32))[token]):
            raise UserError(f"{token} of {text!r}")
        constraint.accept(token)


def ids_inside(kind: str, text: str) -> list[int]:
    """Ids of `text` without the space that SentencePiece sets before a whole text."""
    source = json.loads(tokenizer_of(kind).to_bytes())
    if kind == "sentencepiece":
        source["normalizer"]["normalizers"] = source["normalizer"]["normalizers"][1:]
    return list(tokenizers.Tokenizer.from_str(json.dumps(source)).encode(text).ids)


kinds = pytest.mark.parametrize("kind", ["toy", "byte_level", "sentencepiece"])

SCHEMAS = {
    "flat": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "count": {"type": "integer", "minimum": -3, "maximum": 120},
            "share": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            "unit": {"enum": ["°C", "°F", "日本", None, 5]},
            "sure": {"type": "boolean"},
        },
        "required": ["city", "count", "unit"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "people": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {
                    "type": "object",
                    "properties": {"name": {"const": "Ünïcödé 🦙"}, "age": {"type": ["integer", "null"]}},
                    "required": ["name", "age"],
                    "additionalProperties": False,
                },
            },
            "either": {"anyOf": [{"type": "string", "pattern": "^[a-c]{2,4}$"}, {"type": "integer"}]},
        },
        "required": ["people", "either"],
        "additionalProperties": False,
    },
    "recursive": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"v": {"type": "integer"}, "left": {"$ref": "#/$defs/tree"}},
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    "pair": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": 1}], "items": False, "minItems": 2},
    "one of": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, "value": value},
                "required": ["kind", "value"],
                "additionalProperties": False,
            }
            for kind, value in (("a", {"type": "integer", "multipleOf": 7}), ("b", {"type": "string", "minLength": 3}))
        ]
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
            {"properties": {"a": {"maximum": 9}, "b": {"type": "boolean"}}, "required": ["b"]},
        ],
        "properties": {"a": True, "b": True},
        "additionalProperties": False,
    },
    "numbers": {"type": "array", "items": {"type": "number", "multipleOf": 0.25, "exclusiveMinimum": -3, "maximum": 3}},
    "patterns": {
        "type": "object",
        "patternProperties": {"^[a-b]{1,2}$": {"type": "integer"}},
        "additionalProperties": False,
        "minProperties": 1,
    },
    "formats": {
        "type": "object",
        "properties": {"day": {"type": "string", "format": "date"}, "id": {"type": "string", "format": "uuid"}},
        "required": ["day", "id"],
        "additionalProperties": {"type": "null"},
        "x-order": ["day", "id"],
    },
}


@kinds
@pytest.mark.parametrize("name", SCHEMAS)
def test_random_answers_fit_the_schema(kind, name):
    grammars_of(kind).check(json_schema_grammar(SCHEMAS[name]))
    valid = jsonschema_rs.validator_for(SCHEMAS[name], validate_formats=True)
    for seed in range(6):
        text = answer(kind, json_schema_grammar(SCHEMAS[name]), seed)
        assert valid.is_valid(json.loads(text)), text


@kinds
def test_random_objects_are_objects(kind):
    for seed in range(6):
        assert isinstance(json.loads(answer(kind, json_object_grammar(), seed)), dict)


@kinds
@pytest.mark.parametrize("value", [{"ключ": '🦙é\n\u2028\\ "x" 你好'}, {"a": [1.5e-3, -0.0, None, True, {}, []]}, {}])
@pytest.mark.parametrize("indent", [None, 2])
def test_usual_ways_to_write_an_object_are_allowed(kind, value, indent):
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    assert write(kind, json_object_grammar(), text).finished


@kinds
def test_whitespace_has_an_end(kind):
    write(kind, json_object_grammar(), '{ "a" : 1 ,\n\t\t"b":2 }')
    for text in ('{ \n"a":1}', '{\n\n"a":1}', '{"a":  1}', " {}"):
        with pytest.raises(UserError):
            write(kind, json_object_grammar(), text)


@kinds
def test_special_and_padding_ids_never_come_inside_strings(kind):
    constraint = write(kind, json_object_grammar(), '{"a": "b')
    allowed = np.isfinite(constraint.masked(np.zeros(size_of(kind), np.float32)))
    source = json.loads(tokenizer_of(kind).to_bytes())
    assert not allowed[[token["id"] for token in source["added_tokens"]]].any()
    assert not allowed[tokenizer_of(kind).vocab_size :].any()
    assert allowed.sum() > 100


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_every_end_token_is_allowed_where_the_grammar_may_end(kind):
    ends = list(tokenizer_of(kind).eos_token_ids)
    assert len(ends) == 2
    for end in ends:
        constraint = write(kind, json_schema_grammar({"type": "integer"}), "12")
        assert not constraint.finished
        assert np.isfinite(constraint.masked(np.zeros(size_of(kind), np.float32))[ends]).all()
        constraint.accept(end)
        assert constraint.finished
        with pytest.raises(UserError, match="may not follow"):
            constraint.accept(ends[0])


def test_an_end_token_that_is_plain_text_ends_and_nothing_else():
    plain = tokenizer_of("toy").encode("e", add_bos=False)[0]
    tokenizer = Tokenizer(toy_tokenizer(), bos_token_id=None, eos_token_ids=(TOY_END, plain), add_bos=False)
    constraint = Grammars(tokenizer, tokenizer.vocab_size).constraint("start: /[a-z]{2,}/")
    zeros = np.zeros(tokenizer.vocab_size, np.float32)
    letter = tokenizer.encode("a", add_bos=False)[0]
    constraint.accept(letter)
    assert np.isneginf(constraint.masked(zeros)[[plain, TOY_END]]).all()
    constraint.accept(letter)
    assert np.isfinite(constraint.masked(zeros)[[plain, TOY_END]]).all()
    constraint.accept(plain)
    assert constraint.finished


@pytest.mark.parametrize("ends", [(), (99999,)])
def test_a_model_without_an_end_token_stops_when_the_grammar_does(ends):
    tokenizer = Tokenizer(toy_tokenizer(), bos_token_id=None, eos_token_ids=ends, add_bos=False)
    constraint = Grammars(tokenizer, tokenizer.vocab_size + 5).constraint('start: "ab"')
    while not constraint.finished:
        allowed = np.isfinite(constraint.masked(np.zeros(tokenizer.vocab_size + 5, np.float32)))
        constraint.accept(int(np.flatnonzero(allowed)[0]))


def test_masked_keeps_type_values_and_the_original():
    constraint = grammars_of("toy").constraint(json_object_grammar())
    logits = np.arange(size_of("toy"), dtype=np.float32)
    masked = constraint.masked(logits)
    assert masked.dtype == np.float32
    np.testing.assert_array_equal(logits, np.arange(size_of("toy")))
    kept = np.isfinite(masked)
    assert kept.any()
    np.testing.assert_array_equal(masked[kept], logits[kept])


def test_logits_may_be_fewer_than_the_tokenizers_ids():
    tokenizer = tokenizer_of("toy")
    constraint = Grammars(tokenizer, tokenizer.vocab_size - 2).constraint(json_object_grammar())
    assert constraint.masked(np.zeros(tokenizer.vocab_size - 2, np.float32)).shape == (tokenizer.vocab_size - 2,)


def test_a_token_that_does_not_fit_is_refused_from_then_on():
    constraint = grammars_of("toy").constraint(json_object_grammar())
    wrong = tokenizer_of("toy").encode("a", add_bos=False)[0]
    with pytest.raises(UserError, match="may not follow"):
        constraint.accept(wrong)
    with pytest.raises(UserError, match="given up"):
        constraint.masked(np.zeros(size_of("toy"), np.float32))


def test_where_no_token_can_follow_an_error_says_so():
    constraint = grammars_of("toy").constraint(json_object_grammar())
    with pytest.raises(UserError, match="no token"):
        constraint.masked(np.zeros(3, np.float32))


def test_markers_are_tokens_or_text():
    grammars, tokenizer = grammars_of("byte_level"), tokenizer_of("byte_level")
    begin = grammars.token_id(vocabularies.BEGIN)
    assert begin is not None
    assert grammars.token_id("<nothing>") is None
    grammar = f'start: {token_rule(begin)} {text_rule("é<x>" + chr(10))} {json_rule({"type": "integer"})} "}}"\n'
    assert write("byte_level", grammar, vocabularies.BEGIN + "é<x>\n12}").finished
    assert tokenizer.decode([begin], skip_special=False) == vocabularies.BEGIN


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"properties": {"a": 5}}, "/properties/a"),
        ({"minimum": float("nan")}, "written as JSON"),
        ({"const": {1, 2}}, "written as JSON"),
        (
            {"items": {"properties": {str(i): {} for i in range(1201)}, "required": ["7"]}},
            "1200 optional properties at /items/properties",
        ),
    ],
)
def test_what_is_no_schema_or_can_never_be_held_is_refused_by_name(schema, named):
    with pytest.raises(UserError, match=named):
        json_schema_grammar(schema)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "sting"}, "sting"),
        ({"type": "string", "pattern": r"(a)\1"}, "regex"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"type": "object", "patternProperties": {"^a": {"type": "null"}, "^ab": {"type": "integer"}}}, "disjoint"),
        ({"type": "object", "required": ["z"], "additionalProperties": False}, "'z' is unsatisfiable"),
        ({"anyOf": [{"type": "object", "properties": {f"{a}{b}": {} for b in range(300)}} for a in range(9)]}, "items"),
        ({"$ref": "#/$defs/nowhere"}, "nowhere"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"$ref": "#"}, "no text fits|not accepted"),
        ({"type": "integer", "multipleOf": 999983, "minimum": 1, "maximum": 10**15}, "fuel"),
        ({"const": "\ud800"}, "not accepted"),
        ({"minimum": 10**400}, "not accepted"),
    ],
)
def test_what_llguidance_refuses_is_refused_in_one_line(schema, named):
    with pytest.raises(UserError, match=named) as refusal:
        grammars_of("toy").check(json_schema_grammar(schema))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_a_schema_of_any_depth_is_refused_without_harm(depth):
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    with pytest.raises(UserError):
        grammars_of("toy").check(json_schema_grammar(schema))


@pytest.mark.parametrize("grammar", ["", "start: x", 'start: "a', "start: <no_such_token>", "start: <[999999]>", "\0"])
def test_wrong_grammars_are_refused(grammar):
    with pytest.raises(UserError, match="not accepted"):
        grammars_of("toy").check(grammar)


def test_a_grammar_is_built_once_for_all_who_ask_for_it_together(monkeypatch):
    grammars, built = Grammars(tokenizer_of("toy"), size_of("toy")), []
    build = grammars._build
    monkeypatch.setattr(grammars, "_build", lambda grammar: built.append(grammar) or build(grammar))
    grammar = json_schema_grammar({"properties": {f"p{i}": {"type": "string"} for i in range(200)}})
    with ThreadPoolExecutor(8) as pool:
        constraints = list(pool.map(grammars.constraint, [grammar] * 16))
    assert built == [grammar]
    for constraint in constraints:  # each goes its own way
        constraint.accept(int(np.flatnonzero(np.isfinite(constraint.masked(np.zeros(size_of("toy"), np.float32))))[0]))


def test_built_grammars_are_kept_in_a_bounded_number():
    grammars = Grammars(tokenizer_of("toy"), size_of("toy"))
    for i in range(MOST_KEPT + 5):
        grammars.check(json_schema_grammar({"const": i}))
    assert len(grammars._built) == MOST_KEPT
    with pytest.raises(UserError, match="not accepted"):
        grammars.check("start: nonsense")
    assert "start: nonsense" not in grammars._built


def test_a_grammar_that_is_too_large_is_refused_before_it_is_built():
    schema = {"enum": ["x" * 1000 + str(i) for i in range(1100)]}
    with pytest.raises(UserError, match="too large"):
        grammars_of("toy").check(json_schema_grammar(schema))


def test_an_answer_that_cannot_go_on_says_that_its_grammar_is_at_fault():
    many = {"anyOf": [{"properties": {f"{a}{b}": {} for b in range(300)}} for a in range(9)]}
    schema = {"type": "array", "minItems": 1, "prefixItems": [{"enum": ["some words", "other words"]}], "items": many}
    constraint = write("toy", json_schema_grammar(schema), '["some words"')
    assert not constraint.refused
    with pytest.raises(UserError, match="cannot keep to its grammar"):
        go_on("toy", constraint, ', {"')
    assert constraint.refused


def test_a_tokenizer_that_llguidance_does_not_know_is_refused():
    words = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}, "version": "1.0"}
    tokenizer = Tokenizer(json.dumps(words).encode(), bos_token_id=None, eos_token_ids=(1,), add_bos=False)
    with pytest.raises(UserError, match="tokenizer allows no grammars"):
        Grammars(tokenizer, 2).check(json_object_grammar())


def test_without_llguidance_the_package_is_named(monkeypatch):
    load = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "llguidance":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"pip install 'mpillama\[serve\]'"):
        Grammars(tokenizer_of("toy"), 400).check(json_object_grammar())
