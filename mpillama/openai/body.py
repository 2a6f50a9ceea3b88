"""Base of all request bodies: ignored, refused and unknown fields, and what is wrong in one sentence."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)

MOST_UNKNOWN = 16
"""Unknown fields of a body that are told."""
AnyBody = TypeVar("AnyBody", bound="Body")
Ignored = Annotated[Any, Field(description="taken without effect")]


class BadRequest(Exception):  # noqa: N818 - named as its status is
    """A request that cannot be served: what is wrong, and in which field."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


def refusing(reason: str, *harmless: Any) -> AfterValidator:
    """Validator of an unsupported field: refuses any value but null and the `harmless` ones."""

    def check(value: Any) -> None:
        if value is not None and value not in harmless:
            raise ValueError(reason)

    return AfterValidator(check)


class Body(BaseModel):
    """What every request has."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True)

    _unknown: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _note_unknown(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        body = handler(data)
        if isinstance(data, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            body._unknown = list(islice((n for n, v in data.items() if v is not None and n not in known), MOST_UNKNOWN))
        return body

    def unknown_fields(self) -> list[str]:
        """Paths of unknown fields that have a value, nested ones included; at most MOST_UNKNOWN."""
        return list(islice(_unknown_fields(self, ""), MOST_UNKNOWN))


def _unknown_fields(body: Body, place: str) -> Iterator[str]:
    yield from (place + name for name in body._unknown)
    for name in type(body).model_fields:
        value = getattr(body, name)
        if isinstance(value, Body):
            yield from _unknown_fields(value, f"{place}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Body):
            for index, part in enumerate(value):
                yield from _unknown_fields(part, f"{place}{name}.{index}.")


def parse_body(kind: type[AnyBody], fields: Any) -> AnyBody:
    """Check a decoded JSON object; BadRequest names the first field that is wrong."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise bad_request(found, fields) from error


def bad_request(errors: Sequence[Any], fields: Any) -> BadRequest:
    """What pydantic found wrong with `fields`, as one sentence on the deepest place."""
    places = [_place(error["loc"], fields, error["type"] == "missing") for error in errors]
    deepest = max(range(len(errors)), key=lambda i: len(places[i]))
    first = errors[deepest]
    place = ".".join(str(part) for part in places[deepest]) or "body"
    return BadRequest(f"{place}: {first['msg'].removeprefix('Value error, ')}", place)


def _place(location: Sequence[Any], fields: Any, is_missing: bool) -> list[Any]:
    """The part of pydantic's location that is a way through the data: it also names the types it tried."""
    place = []
    for i, part in enumerate(location):
        if isinstance(fields, dict) and (part in fields or (is_missing and i == len(location) - 1)):
            place.append(part)
            fields = fields.get(part)
        elif isinstance(fields, list) and isinstance(part, int) and part < len(fields):
            place.append(part)
            fields = fields[part]
    return place
