"""The converters of `dataclass_codec`: each turns the values of one annotation into JSON values, and back.

There is one for each kind of annotation except dataclasses themselves, which `codecs.py` converts, because they may
refer to each other. All checks are exact: a bool is not an int, and an instance of a subclass is refused, because it
would not come back as one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime, timezone
from enum import Enum, Flag
from typing import Any, Final, NoReturn, get_args
from uuid import UUID

from ..errors import OptionError
from ..wording import quote

__all__ = [
    "SIMPLE",
    "Convert",
    "Converter",
    "Refused",
    "enum_converter",
    "literal_converter",
    "mapping_converter",
    "name_of",
    "refuse_type",
    "sequence_converter",
    "tuple_converter",
    "union_converter",
]

_INT_RANGE = range(-(2**63), 2**63)

Convert = Callable[[Any], Any]


class Refused(Exception):
    """A value is refused. Each level that the error passes adds its step, so the path costs nothing if all is well."""

    def __init__(self, reason: str, *steps: str | int) -> None:
        super().__init__(reason)
        self.steps: list[str | int] = list(steps)


@dataclass(frozen=True, slots=True, eq=False)
class Converter:
    """How values of one annotation are converted to JSON values, and back."""

    name: str
    encode: Convert
    decode: Convert
    types: Collection[type]
    """The types of the values that `encode` takes."""
    stored: Collection[type]
    """The types of the JSON values that `decode` takes."""
    as_is: Collection[type] = ()
    """The types of values that `encode` and `decode` return as they are, so that a caller need not call them."""


def name_of(hint: Any) -> str:
    """The name of an annotation in messages."""
    if isinstance(hint, type) and not get_args(hint):
        return quote(hint.__name__)[1:-1]
    try:
        return f"{hint!r:.80}"
    except Exception:  # an annotation may be any object, and its `repr` may raise anything
        return quote(hint)


def refuse_type(wanted: str, value: object) -> NoReturn:
    """Refuse a value because of its type, which is named; the value itself is not shown."""
    raise Refused(f"should be {wanted}, not {type(value).__name__}")


def _exactly(name: str, *kinds: type) -> Converter:
    def check(value: Any) -> Any:
        if type(value) in kinds:
            return value
        refuse_type(name, value)

    return Converter(name, check, check, kinds, kinds, kinds)


def _as_text(kind: type, write: Callable[[Any], str], read: Callable[[str], Any]) -> Converter:
    def encode(value: Any) -> str:
        if type(value) is not kind:
            refuse_type(kind.__name__, value)
        return write(value)

    def decode(stored: Any) -> Any:
        if type(stored) is not str:
            refuse_type(f"a str with a {kind.__name__}", stored)
        try:
            return read(stored)
        except ValueError:
            raise Refused(f"is not the text of a {kind.__name__}") from None

    return Converter(kind.__name__, encode, decode, (kind,), (str,))


def _write_datetime(value: datetime) -> str:
    if type(value.tzinfo) not in (timezone, types.NoneType):
        raise Refused("a datetime keeps no time zone but a fixed offset; convert it with astimezone(timezone.utc)")
    return value.isoformat()


_ANY: Final = Converter("Any", lambda value: value, lambda value: value, (), ())
_INT: Final = _exactly("int", int)
_FLOAT: Final = _exactly("float", float, int)
SIMPLE: Final[dict[Any, Converter]] = {
    Any: _ANY,
    int: _INT,
    float: _FLOAT,
    str: _exactly("str", str),
    bool: _exactly("bool", bool),
    types.NoneType: _exactly("None", types.NoneType),
    datetime: _as_text(datetime, _write_datetime, datetime.fromisoformat),
    date: _as_text(date, date.isoformat, date.fromisoformat),
    UUID: _as_text(UUID, str, UUID),
}


def _each(conversions: Iterable[Any]) -> list[Any]:
    """All members converted; the error for a refused one gets its index."""
    converted: list[Any] = []
    try:
        converted.extend(conversions)
    except Refused as refused:
        refused.steps.append(len(converted))
        raise
    return converted


def _each_item(convert_key: Convert, convert: Convert, items: dict[Any, Any], *, decodes: bool) -> dict[Any, Any]:
    """All items converted; the error for a refused value gets its key, as it is written in JSON."""
    converted = {}
    for key, value in items.items():
        new_key = convert_key(key)
        try:
            converted[new_key] = convert(value)
        except Refused as refused:
            refused.steps.append(key if decodes else new_key)
            raise
    return converted


def sequence_converter(kind: type[Any], member: Converter, name: str) -> Converter:
    """A list, tuple, set or frozenset of members that are all alike."""
    is_set = kind in (set, frozenset)

    def encode(value: Any) -> list[Any]:
        if type(value) is not kind:
            refuse_type(name, value)
        if is_set:  # sorted: a set that is loaded has another order, and would count as changed
            return sorted(map(member.encode, value))
        return _each(map(member.encode, value))

    def decode(stored: Any) -> Any:
        if type(stored) is not list:
            refuse_type(f"the list of a {name}", stored)
        members = _each(map(member.decode, stored))
        return members if kind is list else kind(members)

    return Converter(name, encode, decode, (kind,), (list,))


def tuple_converter(members: list[Converter], name: str) -> Converter:
    encoders, decoders = [converter.encode for converter in members], [converter.decode for converter in members]

    def convert(converters: list[Convert], values: Collection[Any]) -> list[Any]:
        if len(values) != len(converters):
            raise Refused(f"should have {len(converters)} members, not {len(values)}")
        return _each(map(lambda convert, value: convert(value), converters, values))

    def encode(value: Any) -> list[Any]:
        if type(value) is not tuple:
            refuse_type(name, value)
        return convert(encoders, value)

    def decode(stored: Any) -> tuple[Any, ...]:
        if type(stored) is not list:
            refuse_type(f"the list of a {name}", stored)
        return tuple(convert(decoders, stored))

    return Converter(name, encode, decode, (tuple,), (list,))


def _write_int_key(key: Any) -> str:
    if type(key) is not int or key not in _INT_RANGE:
        raise Refused(f"a key should be an int of 64 bits, not {type(key).__name__}")
    return str(key)


def _read_int_key(key: str) -> int:
    try:
        number = int(key)
        if str(number) == key:  # `int` also takes "007" and " 7", which would not be written back so
            return number
    except ValueError:
        pass
    raise Refused("a key is not the text of an int")


def _check_str_key(key: Any) -> Any:
    if type(key) is not str:
        raise Refused(f"a key should be str, not {type(key).__name__}")
    return key


def mapping_converter(key: type, member: Converter, name: str) -> Converter:
    write, read = (_check_str_key, _check_str_key) if key is str else (_write_int_key, _read_int_key)

    def encode(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            refuse_type(name, value)
        return _each_item(write, member.encode, value, decodes=False)

    def decode(stored: Any) -> dict[Any, Any]:
        if type(stored) is not dict:
            refuse_type(name, stored)
        return _each_item(read, member.decode, stored, decodes=True)

    return Converter(name, encode, decode, (dict,), (dict,))


def literal_converter(values: tuple[Any, ...], name: str, place: str) -> Converter:
    kinds = {type(value) for value in values}
    if not kinds <= {int, str, bool, types.NoneType}:
        raise OptionError(f"{place}: a Literal that is stored holds int, str, bool and None only, not {name}")
    allowed = {(type(value), value) for value in values}  # with the type, because 1 == True

    def check(value: Any) -> Any:
        if type(value) not in kinds:
            refuse_type(name, value)
        if (type(value), value) not in allowed:
            raise Refused(f"should be one of {name}")
        return value

    return Converter(name, check, check, kinds, kinds)


def enum_converter(cls: type[Enum], place: str) -> Converter:
    kinds = {type(member.value) for member in cls.__members__.values()}
    if not kinds or not kinds <= {int, str}:
        raise OptionError(f"{place}: an Enum is stored by value, and those of {cls.__name__} are not all int or str")

    def encode(value: Any) -> Any:
        if type(value) is not cls:
            refuse_type(cls.__name__, value)
        return value.value

    def decode(stored: Any) -> Enum:
        if type(stored) not in kinds:
            refuse_type(f"the value of a {cls.__name__}", stored)
        with suppress(ValueError):
            member = cls(stored)
            if not isinstance(member, Flag) or member.value == stored:  # a Flag may drop bits that it does not know
                return member
        raise Refused(f"is not the value of a {cls.__name__}")

    return Converter(cls.__name__, encode, decode, (cls,), kinds)


def union_converter(members: list[Converter], name: str, place: str) -> Converter:
    if _ANY in members:
        return _ANY
    readers: dict[type, Converter] = {}
    for converter in members:
        for kind in converter.stored:
            other = readers.setdefault(kind, converter)
            if other is not converter and {other, converter} != {_INT, _FLOAT}:  # either leaves an int as it is
                raise OptionError(
                    f"{place}: {other.name} and {converter.name} are both stored as {name_of(kind)}, and could not be "
                    "told apart when loaded"
                )
    encoders = {kind: converter.encode for converter in members for kind in converter.types}
    decoders = {kind: converter.decode for kind, converter in readers.items()}

    def encode(value: Any) -> Any:
        convert = encoders.get(type(value))
        return refuse_type(name, value) if convert is None else convert(value)

    def decode(stored: Any) -> Any:
        convert = decoders.get(type(stored))
        return refuse_type(name, stored) if convert is None else convert(stored)

    as_is = {kind for converter in members for kind in converter.as_is}
    return Converter(name, encode, decode, tuple(encoders), tuple(decoders), as_is)
