"""Codecs for typed data: `dataclass_codec` and `msgspec_codec`, each a pair of functions for `encode=` and `decode=`.

`dataclass_codec` reads the annotations of a dataclass once, and builds a tree of converters from them. The converters
of single values are in `converters.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, overload

from .._core import path_of, refusal
from ..errors import EncodingError, MissingExtraError, OptionError
from ..options import one_of
from ..wording import quote
from .converters import (
    SIMPLE,
    Convert,
    Converter,
    Refused,
    enum_converter,
    literal_converter,
    mapping_converter,
    name_of,
    refuse_type,
    sequence_converter,
    tuple_converter,
    union_converter,
)

__all__ = ["Codec", "dataclass_codec", "msgspec_codec"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """Two functions for `encode=` and `decode=`, for values of one type.

    Both raise `EncodingError` with the path of a value that they refuse. To read data that older versions of the
    program wrote, wrap `decode`:
    ``def load(value, schema): return players.decode(upgrade(value) if schema < 2 else value)``.
    """

    encode: Callable[[T], Any]
    """Turns a value into a JSON value. The two may share parts, so use the result before the value changes."""
    decode: Callable[[Any], T]
    """Turns a JSON value into a new value."""


def dataclass_codec(cls: type[T], *, unknown: Literal["refuse", "drop"] = "refuse") -> Codec[T]:
    """Make a codec for the instances of a dataclass. Each is stored as a JSON object with one member for each field.

    Fields may be annotated with

    - ``int``, ``str``, ``bool``, ``None``; ``float``, which takes an int too and keeps it one; ``Any``, for JSON values
    - ``list[X]``, ``dict[str, X]``, ``dict[int, X]``, ``tuple[X, ...]``, ``tuple[X, Y]``
    - ``set[X]`` and ``frozenset[X]`` where X is ``str`` or ``int``, stored in order
    - other dataclasses, and the class itself
    - ``datetime`` (naive or with a fixed offset; `fold` is not kept), ``date`` and ``UUID``, stored as text
    - an ``Enum`` whose values are int or str, stored by value; ``Literal`` of int, str, bool and None
    - ``X | Y`` of those, provided that no two are stored as the same kind of JSON value
    - ``NewType`` and ``Annotated`` of those

    Values are checked in both directions, exactly: a bool is not an int, and an instance of a subclass is refused. A
    field that is not stored takes its default. `unknown` says what becomes of a stored member that is no field:
    ``"refuse"`` reports it, ``"drop"`` leaves it out, and the next save removes it. Instances are made by calling the
    class, so ``__post_init__`` runs; fields with ``init=False`` are stored too, and set afterwards.

    The annotations are read here, once. Raises `OptionError`, which names the field, for one that cannot be stored.
    """
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        raise OptionError(f"dataclass_codec takes a dataclass, not {quote(cls)}")
    one_of("unknown", unknown, ("refuse", "drop"))
    converter = _Converters(drops_unknown=unknown == "drop").of(cls, cls.__name__)
    return Codec(_with_path(converter.encode), _with_path(converter.decode))


def _with_path(convert: Convert) -> Convert:
    def checked(value: Any) -> Any:
        try:
            return convert(value)
        except Refused as refused:
            raise refusal(path_of(reversed(refused.steps)), str(refused)) from refused.__cause__
        except RecursionError:
            raise EncodingError("user_data: too deeply nested, or inside itself") from None

    return checked


def _base(hint: Any) -> Any:
    """The type under a NewType, or under several; any other annotation as it is."""
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    return hint


class _Converters:
    """The converters of a class and all annotations in it; one for each class, as classes may refer to each other."""

    def __init__(self, *, drops_unknown: bool) -> None:
        self.drops_unknown = drops_unknown
        self.of_classes: dict[type, Converter] = {}

    def of(self, hint: Any, place: str) -> Converter:
        """The converter of an annotation; `place` is the field's name in messages. Raises `OptionError`."""
        hint = types.NoneType if hint is None else _base(hint)
        kind, arguments, name = get_origin(hint) or hint, get_args(hint), name_of(hint)
        if kind is Final and arguments:
            return self.of(arguments[0], place)
        if kind is Literal:
            return literal_converter(arguments, name, place)
        if kind is Union or kind is types.UnionType:
            return union_converter([self.of(argument, place) for argument in arguments], name, place)
        if hint is tuple:  # without members: as many as there are, of any type
            arguments = (Any, ...)
        if kind is tuple and arguments[1:] == (...,):
            return sequence_converter(tuple, self.of(arguments[0], place), name)
        if kind is tuple:
            return tuple_converter([self.of(argument, place) for argument in arguments], name)
        if kind is list:
            return sequence_converter(list, self.of(arguments[0] if arguments else Any, place), name)
        if kind in (set, frozenset) and arguments:
            member = self.of(arguments[0], place)
            if member in (SIMPLE[int], SIMPLE[str]):
                return sequence_converter(kind, member, name)
        if kind is dict:
            key, member_hint = arguments or (str, Any)
            if _base(key) in (str, int):
                return mapping_converter(_base(key), self.of(member_hint, place), name)
        if kind is hint and not arguments:
            if hint in SIMPLE:
                return SIMPLE[hint]
            if isinstance(hint, type) and issubclass(hint, Enum):
                return enum_converter(hint, place)
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                return self.of_classes.get(hint) or self.make(hint)
        raise OptionError(
            f"{place}: dataclass_codec does not store {name}; its documentation lists what it does. For anything else "
            "write a pair of functions for encode= and decode="
        )

    def make(self, cls: type[Any]) -> Converter:
        name, drops_unknown = cls.__name__, self.drops_unknown
        # Filled below, after `of_classes` has the converter: a field may be of this very class.
        encoders: list[tuple[str, Collection[type], Convert]] = []
        decoders: list[tuple[str, Collection[type], Convert, bool, bool]] = []
        known: set[str] = set()

        def encode(value: Any) -> dict[str, Any]:
            if type(value) is not cls:
                refuse_type(name, value)
            stored = {}
            for field, as_is, convert in encoders:
                try:
                    member = getattr(value, field)
                    stored[field] = member if type(member) in as_is else convert(member)
                except AttributeError:
                    raise Refused("has no value", field) from None
                except Refused as refused:
                    refused.steps.append(field)
                    raise
            return stored

        def decode(stored: Any) -> Any:
            if type(stored) is not dict:
                refuse_type(f"the object of a {name}", stored)
            given: dict[str, Any] = {}
            later: dict[str, Any] = {}
            for field, as_is, convert, is_argument, required in decoders:
                try:
                    if field in stored:
                        member = stored[field]
                        into = given if is_argument else later
                        into[field] = member if type(member) in as_is else convert(member)
                    elif required:
                        raise Refused(f"is missing, and {name} has no default for it")
                except Refused as refused:
                    refused.steps.append(field)
                    raise
            if not drops_unknown and len(given) + len(later) < len(stored):
                raise Refused(f"{name} has no such field", next(key for key in stored if key not in known))
            try:
                value = cls(**given)
            except Exception as error:
                raise Refused(f"{name} raised {type(error).__name__}") from error
            for field, member in later.items():
                object.__setattr__(value, field, member)  # also where the class is frozen
            return value

        self.of_classes[cls] = converter = Converter(name, encode, decode, (cls,), (dict,))
        try:
            hints = get_type_hints(cls)
        except Exception as error:
            raise OptionError(f"{name}: its annotations cannot be read ({type(error).__name__}: {error})") from error
        fields = dataclasses.fields(cls)
        for field in fields:
            member = self.of(hints[field.name], f"{name}.{field.name}")
            required = field.init and field.default is field.default_factory is dataclasses.MISSING
            encoders.append((field.name, member.as_is, member.encode))
            decoders.append((field.name, member.as_is, member.decode, field.init, required))
            known.add(field.name)
        _check_constructor(cls, {field.name for field in fields if field.init})
        return converter


def _check_constructor(cls: type[Any], arguments: set[str]) -> None:
    """Raise `OptionError` if instances cannot be made from their fields, for example for a required `InitVar`."""
    parameters = inspect.signature(cls).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        missing = arguments - {parameter.name for parameter in parameters}
        if missing:
            raise OptionError(f"{cls.__name__}.{min(missing)}: its constructor does not take this field")
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.kind not in variadic and parameter.name not in arguments:
            raise OptionError(f"{cls.__name__}: its constructor requires {parameter.name!r}, which is no field")


@overload
def msgspec_codec(kind: type[T]) -> Codec[T]: ...
@overload
def msgspec_codec(kind: Any) -> Codec[Any]: ...
def msgspec_codec(kind: Any) -> Codec[Any]:
    """Make a codec for the values of a type that msgspec knows: a Struct, a tagged union, an attrs class, ...

    The rules are msgspec's: a stored member that the type does not have is dropped, and the next save removes it,
    unless the Struct says ``forbid_unknown_fields=True``; an int in a float field becomes a float. `encode` converts
    each value there and back, and refuses it if the result is not equal and of the same type. So values have to compare
    by content, as Structs do.

    Raises `MissingExtraError` if msgspec is not installed, and `OptionError` for a type that it cannot handle. A call
    of `encode` takes about seven times as long as `msgspec.json.encode`.
    """
    try:
        import msgspec  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError(
            'msgspec_codec needs msgspec: pip install "cagey-sessions[msgspec]"', extra="msgspec"
        ) from error
    try:
        msgspec.json.Decoder(kind)
    except Exception as error:  # msgspec shows the type in its message, and a `repr` may raise anything
        what = f"{name_of(kind)} ({type(error).__name__})"
        raise OptionError(f"msgspec_codec: msgspec has no codec for {what}") from error

    def decode(stored: Any) -> Any:
        try:
            return msgspec.convert(stored, kind, str_keys=True)
        except msgspec.ValidationError as error:
            path, reason = _read_validation_error(error)
            raise refusal(path, reason) from error.__cause__

    def encode(value: Any) -> Any:
        try:
            stored = msgspec.json.decode(msgspec.json.encode(value))
            back = decode(stored)
            comes_back = type(back) is type(value) and bool(back == value)
        except EncodingError:
            raise
        except Exception as error:
            raise EncodingError(f"user_data: {type(value).__name__} cannot be encoded by msgspec") from error
        if not comes_back:
            raise EncodingError(
                f"user_data: this {type(value).__name__} would not come back as it is; it holds a value that is not "
                "what its annotation says, or does not compare by content"
            )
        return stored

    return Codec(encode, decode)


def _read_validation_error(error: Exception) -> tuple[str, str]:
    """The path and the reason in an error of msgspec, without the data that some of its messages quote."""
    reason, _, place = str(error).partition(" - at `")
    path = re.sub(r"\.([^.\[\]]+)", r'["\1"]', "user_data" + place[place.find("$") + 1 :].rstrip("`"))
    if reason.startswith("Object contains unknown field"):  # and names it: the name is part of the data
        reason = "has a member that is no field"
    elif error.__cause__ is not None:
        reason = f"refused with {type(error.__cause__).__name__}"
    elif not reason.startswith(("Expected `", "Object missing")):
        reason = "is not a value that its annotation allows"
    return path, reason
