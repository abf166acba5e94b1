"""Valid answers are read, hostile ones get a reason, and neither length nor depth nor a schema leads anywhere else."""

from __future__ import annotations

import json
import pickle
import socket
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmkernels.evaluation import AnswerSchema, ParsedAnswer, answer_validity

ANYTHING = AnswerSchema({})
SCHEMA = {
    "oneOf": [
        {
            "type": "object",
            "properties": {
                "digit": {"type": "integer", "minimum": 0, "maximum": 9},
                "box": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 4, "maxItems": 4},
            },
            "required": ["digit", "box"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {"absent": {"const": True}},
            "required": ["absent"],
            "additionalProperties": False,
        },
    ]
}
DIGIT = AnswerSchema(SCHEMA)


@pytest.mark.parametrize(
    "text",
    [
        '{"digit":7,"box":[12,30,20,38]}',
        ' {"box": [0, 0, 1, 1],\n\t"digit": 0} ',
        '{"absent":true}',
        '{"\\u0061bsent":true}',
    ],
)
def test_valid_answers(text: str) -> None:
    assert DIGIT.parse(text) == ParsedAnswer(json.loads(text))
    assert DIGIT.parse(text).valid


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "syntax"),
        ("   ", "syntax"),
        ("\ufeff{}", "syntax"),
        ("It is 7.", "syntax"),
        ('{"absent":true} ', None),
        ('{"absent":true}.', "syntax"),
        ('{"absent":true}{"absent":true}', "syntax"),
        ('```json\n{"absent":true}\n```', "syntax"),
        ('{"absent":true', "syntax"),
        ('{"absent":true,}', "syntax"),
        ("{'absent':true}", "syntax"),
        ('{"absent":True}', "syntax"),
        ('{"absent":true/**/}', "syntax"),
        ('{"absent":true}\x00', "syntax"),
        ('{"absent":true}\u00a0', "syntax"),  # white space, but not of JSON
        ('{"digit":07,"box":[0,0,1,1]}', "syntax"),
        ('{"digit":+7,"box":[0,0,1,1]}', "syntax"),
        ('{"digit":\uff17,"box":[0,0,1,1]}', "syntax"),  # a digit to Python's int
        ('{"absent":"a\nb"}', "syntax"),
        ('{"digit":NaN,"box":[0,0,1,1]}', "number"),
        ('{"digit":-Infinity,"box":[0,0,1,1]}', "number"),
        ('{"digit":1e999,"box":[0,0,1,1]}', "number"),
        ('{"digit":9007199254740992,"box":[0,0,1,1]}', "number"),
        ('{"digit":-9007199254740992,"box":[0,0,1,1]}', "number"),
        ('{"digit":9007199254740991,"box":[0,0,1,1]}', "schema"),
        ('{"digit":' + "9" * 5000 + ',"box":[0,0,1,1]}', "number"),  # more digits than Python converts
        ('{"digit":7,"box":[0,0,1,' + "1" * 9000 + ".5]}", "number"),
        ('{"digit":7,"digit":7,"box":[0,0,1,1]}', "duplicate"),
        ('{"absent":true,"\\u0061bsent":true}', "duplicate"),
        ('{"absent":{"a":1,"a":1}}', "duplicate"),
        ('{"\\ud800":true}', "text"),
        ('{"\ud800":true}', "text"),
        ('["\\ud83d\\ude00"]', "schema"),  # a whole pair
        ("[" * 33 + "]" * 33, "depth"),
        ("[" * 9999, "depth"),
        ('{"a":' * 1999, "depth"),
        ("[" * 32 + "]" * 32, "schema"),
        ("[[]," + "[" * 31 + "]" * 31 + "]", "schema"),  # 33 lists, 32 within each other
        ('["' + "[" * 5000, "syntax"),  # in one without an end too
        ('["' + "[" * 5000 + '"]', "schema"),  # within a string brackets are letters
        ('["\\"' + "[" * 5000 + '"]', "schema"),
        (" " * 10_001, "length"),
        ("[]", "schema"),
        ("null", "schema"),
        ('"absent"', "schema"),
        ('{"absent":false}', "schema"),
        ('{"absent":1}', "schema"),
        ('{"absent":true,"digit":7}', "schema"),
        ('{"digit":7}', "schema"),
        ('{"digit":10,"box":[0,0,1,1]}', "schema"),
        ('{"digit":-1,"box":[0,0,1,1]}', "schema"),
        ('{"digit":7.0,"box":[0,0,1,1]}', "schema"),
        ('{"digit":true,"box":[0,0,1,1]}', "schema"),
        ('{"digit":"7","box":[0,0,1,1]}', "schema"),
        ('{"digit":7,"box":[0,0,1]}', "schema"),
        ('{"digit":7,"box":[0,0,1,1,1]}', "schema"),
    ],
)  # fmt: skip
def test_each_answer_that_is_not_valid_says_why(text: str, kind: str | None) -> None:
    parsed = DIGIT.parse(text)
    assert parsed.kind == kind
    assert parsed.valid == (kind is None)
    if kind is not None:
        assert parsed.value is None
        assert parsed.error
        assert len(parsed.error) <= 200
        assert parsed.error.isascii()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(JSON, st.booleans())
def test_whatever_python_writes_is_read_back(value: Any, ascii: bool) -> None:
    assert ANYTHING.parse(json.dumps(value, ensure_ascii=ascii)) == ParsedAnswer(value)


@given(st.text(st.sampled_from('{}[]",:\\ud80019.eE-+NaInfity tr'), max_size=40))
def test_no_text_raises_and_what_is_valid_python_reads_alike(text: str) -> None:
    parsed = ANYTHING.parse(text)
    if parsed.valid:
        assert json.loads(text) == parsed.value
    else:
        assert parsed.kind in ("syntax", "number", "duplicate", "text", "depth")


@pytest.mark.parametrize(
    "text", ['{"' + '\\"' * 48_000 + "{" * 20, "[" + '"[' * 33_000, '{"a":' + "[]," * 30_000, "9" * 99_000]
)
def test_long_hostile_answers_are_refused(text: str) -> None:
    assert not AnswerSchema({}, max_length=100_000, max_depth=10).parse(text).valid


def test_near_the_end_of_the_stack_depth_is_counted_not_felt() -> None:
    def deep(frames: int) -> ParsedAnswer:
        return deep(frames - 1) if frames else ANYTHING.parse("[" * 5000)

    assert deep(sys.getrecursionlimit() // 3).kind == "depth"


def test_rates_and_kinds() -> None:
    found = answer_validity(iter(['{"absent":true}', "no", "NaN", '{"absent":true}', "[]", "[]"]), SCHEMA)
    assert found.rate == 2 / 6
    assert found.total == 6
    assert found.kinds == {"syntax": 1, "number": 1, "schema": 2}
    assert answer_validity(['{"absent":true}'], DIGIT).kinds == {}


def test_a_schema_with_references() -> None:
    schema = {"$defs": {"n": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/n"}}
    assert AnswerSchema(schema).parse("[1, 2]").valid
    assert AnswerSchema(schema).parse("[1, 2.5]").kind == "schema"
    assert AnswerSchema(schema).parse("[1, 2.0]").kind == "schema"
    tree = {"type": "array", "items": {"$ref": "#"}}
    assert AnswerSchema(tree).parse("[[], [[]]]").valid


def test_no_schema_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(*address: object, **_: object) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    schema = AnswerSchema({"$ref": "http://localhost:1/schema.json"})
    with pytest.raises(ValueError, match="schema must have references to its own parts only, got"):
        schema.parse("{}")
    assert not asked


def test_a_schema_is_copied_and_pickled() -> None:
    """A worker process gets it, and what happens to the mapping later does not change it."""
    mapping = {"properties": {"digit": {"type": "integer"}}}
    schema = AnswerSchema(mapping, max_length=20)
    mapping["properties"]["digit"]["type"] = "string"
    for one in (schema, pickle.loads(pickle.dumps(schema))):
        assert one.parse('{"digit": 7}').valid and one.parse('{"digit": "7"}').kind == "schema"
        assert one.parse(" " * 21).kind == "length"


def test_bad_schemas_and_arguments() -> None:
    with pytest.raises(TypeError, match="schema must be a mapping, got list"):
        AnswerSchema([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"schema must be a JSON Schema, got \$\.type: 'int'"):
        AnswerSchema({"type": "int"})
    with pytest.raises(ValueError, match="schema must end, got references in a circle"):
        AnswerSchema({"$ref": "#"}).parse("1")
    with pytest.raises(ValueError, match="max_depth must be from 1 to 100, got 101"):
        AnswerSchema({}, max_depth=101)
    with pytest.raises(TypeError, match="max_length must be an integer, got float"):
        AnswerSchema({}, max_length=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="text must be a string, got bytes"):
        ANYTHING.parse(b"{}")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="answers must be strings, got dict at 1"):
        answer_validity(["{}", {}], {})  # type: ignore[list-item]
    with pytest.raises(TypeError, match="answers must be strings, got str"):
        answer_validity("{}", {})
    with pytest.raises(ValueError, match="answers must be at least one of strings, got none"):
        answer_validity([], {})


def test_without_jsonschema_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ImportError, match=r'AnswerSchema needs jsonschema: pip install "mmkernels\[evaluation\]"'):
        AnswerSchema({})
