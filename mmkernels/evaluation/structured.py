"""Answers that are JSON of a given form: exactly, or not at all."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from mmkernels.evaluation.checks import imported, texts, whole

_SAFE_INTEGER = 2**53 - 1
"""RFC 8259, section 6: up to here all programs read an integer as the same number."""
_DIGITS = len(str(-_SAFE_INTEGER))
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)  # and strings, within which brackets do not count


class ParsedAnswer(NamedTuple):
    """What a text says, or why it is no valid answer.

    Attributes:
        value: what JSON spells, or None if the text is not valid.
        kind: None, or what is wrong: "length", "depth", "syntax" (trailing text too), "number", "duplicate" (of a key),
            "text" (not encodable) or "schema".
        error: None, or a sentence for a person.
    """

    value: Any
    kind: str | None = None
    error: str | None = None

    @property
    def valid(self) -> bool:
        return self.kind is None


class AnswerValidity(NamedTuple):
    """How many answers are valid.

    Attributes:
        rate: the share of valid answers.
        total: all answers.
        kinds: what is wrong with the others, as in `ParsedAnswer`, -> how many.
    """

    rate: float
    total: int
    kinds: dict[str, int]


class AnswerSchema:
    """The form that an answer must have: a JSON Schema, and a strict parser of untrusted text.

    Valid is a text that is one JSON value (RFC 8259), without anything before or after it but white space, that the
    schema accepts. Not valid, although Python's ``json.loads`` takes them: NaN and Infinity, numbers that overflow a
    float, integers beyond 2^53 - 1, a key that an object has twice, strings that no encoding can write (a lone
    surrogate). An ``integer`` is written without point and exponent: 7.0 is none.

    The schema is read by the package jsonschema (Draft 2020-12), which fetches nothing. Say
    ``"additionalProperties": False`` where an object must have no other keys.

    A ``format`` is not checked, as in the standard. A schema with ``uniqueItems`` compares all pairs of a long list, so
    bound it with ``maxItems``, or bound `max_length`.

    Args:
        schema: a JSON Schema as a Python mapping, which is copied.
        max_length: characters that an answer may have.
        max_depth: objects and lists that may lie within each other, from 1 to 100.

    Raises:
        TypeError: `schema` is no mapping. ValueError: it is no JSON Schema.
        ImportError: jsonschema is not installed.

    Source: Bray, RFC 8259, 2017; JSON Schema, Draft 2020-12.

    Example:
        >>> from mmkernels.evaluation import AnswerSchema
        >>> digit = AnswerSchema(
        ...     {
        ...         "type": "object",
        ...         "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
        ...         "required": ["digit"],
        ...         "additionalProperties": False,
        ...     }
        ... )
        >>> digit.parse('{"digit": 7}').value
        {'digit': 7}
        >>> digit.parse('{"digit": 7, "digit": 8}').error
        "the key 'digit' occurs twice"
        >>> digit.parse('{"digit": 12}').error
        '$.digit: 12 is greater than the maximum of 9'
    """

    def __init__(self, schema: Mapping[str, Any], *, max_length: int = 10_000, max_depth: int = 32) -> None:
        if not isinstance(schema, Mapping):
            raise TypeError(f"schema must be a mapping, got {type(schema).__name__}")
        self.max_length = whole("max_length", max_length, 1)
        self.max_depth = whole("max_depth", max_depth, 1, 100)
        self._validator = _validator(copy.deepcopy(dict(schema)))

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a process that unpickles it compiles again."""
        return {**self.__dict__, "_validator": self._validator.schema}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _validator=_validator(state["_validator"]))

    def parse(self, text: str) -> ParsedAnswer:
        """Returns what a text says, or why it is not valid; no text makes this raise.

        Raises:
            TypeError: `text` is no string. ValueError: the schema has a reference that leads nowhere, or in a circle.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {type(text).__name__}")
        try:
            value = self._read(text)
        except _InvalidError as error:
            return ParsedAnswer(None, error.kind, str(error))
        except json.JSONDecodeError as error:
            return ParsedAnswer(None, "syntax", f"{error.msg} at {error.pos}")
        wrong = self._first_error(value)
        return ParsedAnswer(value) if wrong is None else ParsedAnswer(None, "schema", wrong)

    def _read(self, text: str) -> Any:
        if len(text) > self.max_length:
            raise _InvalidError("length", f"more than {self.max_length} characters: {len(text)}")
        if _deeper(text, self.max_depth):
            raise _InvalidError("depth", f"more than {self.max_depth} objects and lists within each other")
        value = _DECODER.decode(text)
        _check_encodable(text, value)
        return value

    def _first_error(self, value: Any) -> str | None:
        unresolvable = imported("referencing.exceptions", "AnswerSchema").Unresolvable
        try:
            error = next(self._validator.iter_errors(value), None)
        except unresolvable as missing:
            raise ValueError(f"schema must have references to its own parts only, got {missing}") from missing
        except RecursionError as circle:  # the depth of the value is bounded, so it is the schema's
            raise ValueError("schema must end, got references in a circle") from circle
        return None if error is None else _short(f"{error.json_path}: {error.message}")


def answer_validity(answers: Iterable[str], schema: AnswerSchema | Mapping[str, Any]) -> AnswerValidity:
    """Returns the share of answers that are exactly JSON of a given form.

    Args:
        answers: texts.
        schema: a JSON Schema as a mapping, or an `AnswerSchema`, which is faster where it is used again.

    Raises:
        TypeError: an answer is no string. ValueError: there is none, or `schema` is no JSON Schema.

    Source: see `AnswerSchema`.

    Example:
        >>> from mmkernels.evaluation import answer_validity
        >>> schema = {"type": "object", "required": ["digit"]}
        >>> answer_validity(['{"digit": 7}', '{"digit": NaN}', 'It is 7.', "{}"], schema)
        AnswerValidity(rate=0.25, total=4, kinds={'number': 1, 'syntax': 1, 'schema': 1})
    """
    found = texts("answers", answers)
    if not isinstance(schema, AnswerSchema):
        schema = AnswerSchema(schema)
    kinds = [schema.parse(text).kind for text in found]
    wrong = Counter(kind for kind in kinds if kind is not None)
    return AnswerValidity((len(found) - wrong.total()) / len(found), len(found), dict(wrong))


class _InvalidError(Exception):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _constant(name: str) -> NoReturn:
    raise _InvalidError("number", f"{name} is no number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS or abs(int(digits)) > _SAFE_INTEGER:
        raise _InvalidError("number", _short(f"an integer beyond 2^53 - 1: {digits}"))
    return int(digits)


def _fraction(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _InvalidError("number", _short(f"a number that no float can hold: {digits}"))
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise _InvalidError("duplicate", _short(f"the key {twice!r} occurs twice"))
    return found


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_fraction, parse_constant=_constant
)


def _deeper(text: str, most: int) -> bool:
    """Whether more than `most` brackets are open anywhere; found before the parser, which recurses, sees the text."""
    if text.count("{") + text.count("[") <= most:
        return False
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > most:
            return True
    return False


def _check_encodable(text: str, value: Any) -> None:
    """Raise where a string has half of a surrogate pair, as it is or escaped."""
    if text.isascii() and "\\u" not in text:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _InvalidError("text", f"a string that can't be encoded: {error.reason}") from error


def _short(message: str) -> str:
    """Returns a message without the bulk of a hostile answer, in characters that any log can hold."""
    message = message.encode("ascii", "backslashreplace").decode()
    return message if len(message) <= 200 else message[:197] + "..."


def _validator(schema: dict[str, Any]) -> Any:
    jsonschema = imported("jsonschema", "AnswerSchema")
    registry = imported("referencing", "AnswerSchema").Registry()  # else jsonschema fetches what a schema refers to
    draft = jsonschema.Draft202012Validator
    types = draft.TYPE_CHECKER.redefine("integer", lambda _, x: isinstance(x, int) and not isinstance(x, bool))
    kind = jsonschema.validators.extend(draft, type_checker=types)
    try:
        draft.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(_short(f"schema must be a JSON Schema, got {error.json_path}: {error.message}")) from error
    return kind(schema, registry=registry)
