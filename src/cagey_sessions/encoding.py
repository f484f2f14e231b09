"""From a user's data to its bytes and back. What lives here: the rules of that step, and codecs that take dataclasses
and msgspec types to JSON values and back. What must not: when to save, where to, any I/O.

What is stored is what comes back, of the same types, or the step is refused with the path of the offending value:

    value --encode=--> JSON value --exact check, orjson--> body        `Encoding.dump`
    value <--decode=-- JSON value <----------------orjson-- body       `Encoding.load`

`dataclass_codec` and `msgspec_codec` make the pair of functions in the outer column; so can any program.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import date, datetime, timezone
from enum import Enum
from typing import (
    Any,
    Final,
    Generic,
    Literal,
    NoReturn,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)
from uuid import UUID

import orjson

from ._core import encode_plain, path_of
from .errors import CorruptRecordError, EncodingError, MissingExtraError, NewerSchemaError, OptionError

__all__ = ["MAX_BYTES", "Codec", "Encoding", "Stored", "dataclass_codec", "msgspec_codec"]

T = TypeVar("T")

MAX_BYTES = 2**20
"""Of a body, unless the program says otherwise."""

LAST_SCHEMA = 2**31 - 1
"""Any engine keeps it as a plain integer."""

_INT_RANGE = range(-(2**63), 2**63)


class Stored(Protocol):
    """What is read of a record."""

    @property
    def user_id(self) -> int | str: ...
    @property
    def schema(self) -> int: ...
    @property
    def body(self) -> bytes: ...


class Encoding:
    """How one program turns the data of its users into bytes and back.

    `encode` takes the data to a JSON value, `decode` takes a JSON value back; both are plain functions, called with the
    value alone, but a `decode` with a parameter named ``schema`` gets the number stored with the body, so that it can
    read what older versions of the program wrote. Without `encode` the data has to be a JSON value as it is.
    `schema` is the number stored with what is written now, from 0 to 2**31 - 1. `max_bytes` is the most a body may be.

    Raises `OptionError` for arguments that are not that.
    """

    __slots__ = ("_decode", "_encode", "_tells_schema", "max_bytes", "schema")

    def __init__(
        self,
        encode: Callable[[Any], Any] | None = None,
        decode: Callable[..., Any] | None = None,
        schema: int = 0,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        for name, function in (("encode", encode), ("decode", decode)):
            if function is not None and not callable(function):
                raise OptionError(f"{name} is a function, not {type(function).__name__}")
            if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
                raise OptionError(f"{name} is called in one step and cannot wait; make it a plain function")
        if type(schema) is not int or not 0 <= schema <= LAST_SCHEMA:
            raise OptionError(f"schema is a whole number from 0 to {LAST_SCHEMA}{_given(schema)}")
        if type(max_bytes) is not int or max_bytes < 1:
            raise OptionError(f"max_bytes is a whole number from 1 upwards{_given(max_bytes)}")
        self._encode = encode
        self._decode = decode
        self._tells_schema = decode is not None and _has_parameter(decode, "schema")
        self.schema: int = schema
        self.max_bytes: int = max_bytes

    @property
    def converts(self) -> bool:
        """Whether a program's own functions have a part in it."""
        return self._encode is not None or self._decode is not None

    def dump(self, value: object) -> bytes:
        """The body of a value as it is now.

        Raises `EncodingError`, and nothing else, if `encode` does, or if what it returns is None, is not exactly JSON,
        or takes more than `max_bytes`. O(size): about 1.2 times orjson alone on data that is not in the caches.
        """
        _refuse_none(value, "None stands for no data, and is not saved; manager.erase(user_id) removes a user")
        if self._encode is None:
            return encode_plain(value, self.max_bytes)
        try:
            value = self._encode(value)
        except EncodingError:
            raise
        except Exception as error:
            raise EncodingError(f"user_data: encode raised {type(error).__name__}") from error
        _refuse_none(value, "encode returned None; it returns the JSON value to store")
        try:
            return encode_plain(value, self.max_bytes)
        except EncodingError:
            _refuse_awaitable(value, "encode")
            raise

    def load(self, record: Stored) -> Any:
        """The value of a record's body.

        Raises `NewerSchemaError` if a newer version of the program wrote it, and `CorruptRecordError`, which has the
        body, if it is not JSON, if `decode` raises, or if the value is None. O(size).
        """
        if record.schema > self.schema:
            raise NewerSchemaError(
                f"the record of user {record.user_id!r:.80} has schema {record.schema}, and this program reads up to "
                f"{self.schema}; run the newer program. The record is left as it is",
                user_id=record.user_id,
                schema=record.schema,
            )
        try:
            return self._read(record.body, record.schema)
        except EncodingError as error:
            raise CorruptRecordError(
                f"the record of user {record.user_id!r:.80} cannot be read, and is left as it is: {error}",
                user_id=record.user_id,
                body=record.body,
            ) from error.__cause__

    def copy(self, value: object) -> Any:
        """A private copy of a value: what a load would return right after a save of it.

        Raises `EncodingError` if it cannot be saved, or not be loaded then. O(size).
        """
        return self._read(self.dump(value), self.schema)

    def _read(self, body: bytes, schema: int) -> Any:
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError as error:  # not chained: it carries the body
            raise EncodingError(f"user_data: not JSON in UTF-8, at character {error.pos}") from None
        if self._decode is None:
            _refuse_none(value, "null stands for no data")
            return value
        try:
            value = self._decode(value, schema=schema) if self._tells_schema else self._decode(value)
        except EncodingError:
            raise
        except Exception as error:
            raise EncodingError(f"user_data: decode raised {type(error).__name__}") from error
        _refuse_none(value, "decode returned None; it returns the user's data")
        _refuse_awaitable(value, "decode")
        return value


def _given(value: object) -> str:
    return f", not {value}" if type(value) is int and value in _INT_RANGE else f", not {type(value).__name__}"


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes, after its first parameter, one that can be given by this name."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):  # some that are written in C do not tell
        return False
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(parameter.name == name and parameter.kind in by_name for parameter in parameters)


def _refuse_none(value: object, reason: str) -> None:
    if value is None:
        raise EncodingError(f"user_data: {reason}")


def _refuse_awaitable(value: object, name: str) -> None:
    if hasattr(type(value), "__await__"):
        if isinstance(value, types.CoroutineType):
            value.close()
        raise EncodingError(f"user_data: {name} returned an awaitable; it is called in one step and cannot wait")


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """The two functions for `encode=` and `decode=`, for values of one type.

    Both raise `EncodingError` with the path of what they refuse. For data of older versions of the program, wrap
    `decode`: ``def load(value, schema): return players.decode(upgrade(value) if schema < 2 else value)``.
    """

    encode: Callable[[T], Any]
    """A value to a JSON value. It may share parts with the value, so use it before anything changes."""
    decode: Callable[[Any], T]
    """A JSON value to a new value."""


def dataclass_codec(cls: type[T], *, unknown: Literal["refuse", "drop"] = "refuse") -> Codec[T]:
    """A codec for the instances of a dataclass, each stored as an object with one member for each field.

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

    The fields are looked at here, once. Raises `OptionError` for a field that cannot be stored, and names it.
    """
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        raise OptionError(f"dataclass_codec takes a dataclass, not {_name(cls)}")
    if unknown not in ("refuse", "drop"):
        raise OptionError("unknown is 'refuse' or 'drop': what becomes of stored members that are no fields")
    plan = _Planner(drops_unknown=unknown == "drop").plan(cls, cls.__name__)
    return Codec(_with_path(plan.encode), _with_path(plan.decode))


Convert = Callable[[Any], Any]


class _Refused(Exception):
    """A value that is refused; each level on the way out adds its step, so the path costs nothing where all is well."""

    def __init__(self, reason: str, *steps: str | int) -> None:
        super().__init__(reason)
        self.steps = list(steps)


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """How values of one annotation are converted."""

    name: str
    encode: Convert
    decode: Convert
    types: Collection[type]
    """Of the values `encode` takes."""
    stored: Collection[type]
    """Of the JSON values `decode` takes."""
    as_is: Collection[type] = ()
    """Of the values both return as they are; so a caller can do without them."""


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else f"{hint!r:.80}"


def _refuse_type(wanted: str, value: object) -> NoReturn:
    raise _Refused(f"should be {wanted}, not {type(value).__name__}")


def _with_path(convert: Convert) -> Convert:
    def checked(value: Any) -> Any:
        try:
            return convert(value)
        except _Refused as refused:
            path = path_of(reversed(refused.steps))
            raise EncodingError(f"{path}: {refused}", path=path) from refused.__cause__
        except RecursionError:
            raise EncodingError("user_data: too deeply nested, or inside itself") from None

    return checked


def _exactly(name: str, *kinds: type) -> _Plan:
    def check(value: Any) -> Any:
        if type(value) in kinds:
            return value
        _refuse_type(name, value)

    return _Plan(name, check, check, kinds, kinds, kinds)


def _as_text(kind: type, write: Callable[[Any], str], read: Callable[[str], Any]) -> _Plan:
    def encode(value: Any) -> str:
        if type(value) is not kind:
            _refuse_type(kind.__name__, value)
        return write(value)

    def decode(stored: Any) -> Any:
        if type(stored) is not str:
            _refuse_type(f"a str with a {kind.__name__}", stored)
        try:
            return read(stored)
        except ValueError:
            raise _Refused(f"is not the text of a {kind.__name__}") from None

    return _Plan(kind.__name__, encode, decode, (kind,), (str,))


def _write_datetime(value: datetime) -> str:
    if type(value.tzinfo) not in (timezone, types.NoneType):
        raise _Refused("a datetime keeps no time zone but a fixed offset; convert it with astimezone(timezone.utc)")
    return value.isoformat()


_ANY: Final = _Plan("Any", lambda value: value, lambda value: value, (), ())
_INT: Final = _exactly("int", int)
_FLOAT: Final = _exactly("float", float, int)
_SIMPLE: Final[dict[Any, _Plan]] = {
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


def _base(hint: Any) -> Any:
    """What a NewType is at run time."""
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    return hint


def _each(conversions: Iterable[Any]) -> list[Any]:
    converted: list[Any] = []
    try:
        converted.extend(conversions)
    except _Refused as refused:
        refused.steps.append(len(converted))
        raise
    return converted


def _each_item(convert_key: Convert, convert: Convert, items: dict[Any, Any], *, decodes: bool) -> dict[Any, Any]:
    converted = {}
    for key, value in items.items():
        new_key = convert_key(key)
        try:
            converted[new_key] = convert(value)
        except _Refused as refused:
            refused.steps.append(key if decodes else new_key)
            raise
    return converted


def _sequence(kind: type[Any], member: _Plan, name: str) -> _Plan:
    """A list, tuple, set or frozenset of members that are all alike."""
    is_set = kind in (set, frozenset)

    def encode(value: Any) -> list[Any]:
        if type(value) is not kind:
            _refuse_type(name, value)
        if is_set:  # sorted, because its order is another one after a load
            return sorted(map(member.encode, value))
        return _each(map(member.encode, value))

    def decode(stored: Any) -> Any:
        if type(stored) is not list:
            _refuse_type(f"the list of a {name}", stored)
        members = _each(map(member.decode, stored))
        return members if kind is list else kind(members)

    return _Plan(name, encode, decode, (kind,), (list,))


def _fixed_tuple(members: list[_Plan], name: str) -> _Plan:
    encoders, decoders = [plan.encode for plan in members], [plan.decode for plan in members]

    def convert(converters: list[Convert], values: Collection[Any]) -> list[Any]:
        if len(values) != len(converters):
            raise _Refused(f"should have {len(converters)} members, not {len(values)}")
        return _each(map(lambda convert, value: convert(value), converters, values))

    def encode(value: Any) -> list[Any]:
        if type(value) is not tuple:
            _refuse_type(name, value)
        return convert(encoders, value)

    def decode(stored: Any) -> tuple[Any, ...]:
        if type(stored) is not list:
            _refuse_type(f"the list of a {name}", stored)
        return tuple(convert(decoders, stored))

    return _Plan(name, encode, decode, (tuple,), (list,))


def _write_int_key(key: Any) -> str:
    if type(key) is not int or key not in _INT_RANGE:
        raise _Refused(f"a key should be an int of 64 bits, not {type(key).__name__}")
    return str(key)


def _read_int_key(key: str) -> int:
    try:
        number = int(key)
        if str(number) == key:
            return number
    except ValueError:
        pass
    raise _Refused("a key is not the text of an int")


def _check_str_key(key: Any) -> Any:
    if type(key) is not str:
        raise _Refused(f"a key should be str, not {type(key).__name__}")
    return key


def _mapping(key: type, member: _Plan, name: str) -> _Plan:
    write, read = (_check_str_key, _check_str_key) if key is str else (_write_int_key, _read_int_key)

    def encode(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            _refuse_type(name, value)
        return _each_item(write, member.encode, value, decodes=False)

    def decode(stored: Any) -> dict[Any, Any]:
        if type(stored) is not dict:
            _refuse_type(name, stored)
        return _each_item(read, member.decode, stored, decodes=True)

    return _Plan(name, encode, decode, (dict,), (dict,))


def _literal(values: tuple[Any, ...], name: str, place: str) -> _Plan:
    kinds = {type(value) for value in values}
    if not kinds <= {int, str, bool, types.NoneType}:
        raise OptionError(f"{place}: a Literal that is stored holds int, str, bool and None only, not {name}")
    allowed = {(type(value), value) for value in values}  # 1 and True are two

    def check(value: Any) -> Any:
        if type(value) not in kinds:
            _refuse_type(name, value)
        if (type(value), value) not in allowed:
            raise _Refused(f"should be one of {name}")
        return value

    return _Plan(name, check, check, kinds, kinds)


def _enum(cls: type[Enum], place: str) -> _Plan:
    kinds = {type(member.value) for member in cls.__members__.values()}
    if not kinds or not kinds <= {int, str}:
        raise OptionError(f"{place}: an Enum is stored by value, and those of {cls.__name__} are not all int or str")

    def encode(value: Any) -> Any:
        if type(value) is not cls:
            _refuse_type(cls.__name__, value)
        return value.value

    def decode(stored: Any) -> Enum:
        if type(stored) not in kinds:
            _refuse_type(f"the value of a {cls.__name__}", stored)
        try:
            return cls(stored)
        except ValueError:
            raise _Refused(f"is not the value of a {cls.__name__}") from None

    return _Plan(cls.__name__, encode, decode, (cls,), kinds)


def _union(members: list[_Plan], name: str, place: str) -> _Plan:
    if _ANY in members:
        return _ANY
    readers: dict[type, _Plan] = {}
    for plan in members:
        for kind in plan.stored:
            other = readers.setdefault(kind, plan)
            if other is not plan and {other, plan} != {_INT, _FLOAT}:  # both leave an int as it is
                raise OptionError(
                    f"{place}: {other.name} and {plan.name} are both stored as {_name(kind)}, and could not be told "
                    "apart when loaded"
                )
    encoders = {kind: plan.encode for plan in members for kind in plan.types}
    decoders = {kind: plan.decode for kind, plan in readers.items()}

    def encode(value: Any) -> Any:
        convert = encoders.get(type(value))
        return _refuse_type(name, value) if convert is None else convert(value)

    def decode(stored: Any) -> Any:
        convert = decoders.get(type(stored))
        return _refuse_type(name, stored) if convert is None else convert(stored)

    as_is = {kind for plan in members for kind in plan.as_is}
    return _Plan(name, encode, decode, tuple(encoders), tuple(decoders), as_is)


class _Planner:
    """Makes the plans of a class and of all it refers to, each class once, so that classes may refer to each other."""

    def __init__(self, *, drops_unknown: bool) -> None:
        self.drops_unknown = drops_unknown
        self.plans: dict[type, _Plan] = {}

    def plan(self, hint: Any, place: str) -> _Plan:
        """The plan of an annotation; `place` is how messages call the field."""
        hint = types.NoneType if hint is None else _base(hint)
        kind, arguments, name = get_origin(hint) or hint, get_args(hint), _name(hint)
        if kind is Final and arguments:
            return self.plan(arguments[0], place)
        if kind is Literal:
            return _literal(arguments, name, place)
        if kind is Union or kind is types.UnionType:
            return _union([self.plan(argument, place) for argument in arguments], name, place)
        if hint is tuple:
            arguments = (Any, ...)
        if kind is tuple and arguments[1:] == (...,):
            return _sequence(tuple, self.plan(arguments[0], place), name)
        if kind is tuple:
            return _fixed_tuple([self.plan(argument, place) for argument in arguments], name)
        if kind is list:
            return _sequence(list, self.plan(arguments[0] if arguments else Any, place), name)
        if kind in (set, frozenset) and arguments:
            member = self.plan(arguments[0], place)
            if member in (_SIMPLE[int], _SIMPLE[str]):
                return _sequence(kind, member, name)
        if kind is dict:
            key, member_hint = arguments or (str, Any)
            if _base(key) in (str, int):
                return _mapping(_base(key), self.plan(member_hint, place), name)
        if kind is hint and not arguments:
            if hint in _SIMPLE:
                return _SIMPLE[hint]
            if isinstance(hint, type) and issubclass(hint, Enum):
                return _enum(hint, place)
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                return self.plans.get(hint) or self.plan_class(hint)
        raise OptionError(
            f"{place}: dataclass_codec does not store {name}; its documentation lists what it does. For anything else "
            "write a pair of functions for encode= and decode="
        )

    def plan_class(self, cls: type[Any]) -> _Plan:
        name, drops_unknown = cls.__name__, self.drops_unknown
        encoders: list[tuple[str, Collection[type], Convert]] = []
        decoders: list[tuple[str, Collection[type], Convert, bool, bool]] = []
        known: set[str] = set()

        def encode(value: Any) -> dict[str, Any]:
            if type(value) is not cls:
                _refuse_type(name, value)
            stored = {}
            for field, as_is, convert in encoders:
                try:
                    member = getattr(value, field)
                    stored[field] = member if type(member) in as_is else convert(member)
                except AttributeError:
                    raise _Refused("has no value", field) from None
                except _Refused as refused:
                    refused.steps.append(field)
                    raise
            return stored

        def decode(stored: Any) -> Any:
            if type(stored) is not dict:
                _refuse_type(f"the object of a {name}", stored)
            given: dict[str, Any] = {}
            later: dict[str, Any] = {}
            for field, as_is, convert, is_argument, required in decoders:
                try:
                    if field in stored:
                        member = stored[field]
                        into = given if is_argument else later
                        into[field] = member if type(member) in as_is else convert(member)
                    elif required:
                        raise _Refused(f"is missing, and {name} has no default for it")
                except _Refused as refused:
                    refused.steps.append(field)
                    raise
            if not drops_unknown and len(given) + len(later) < len(stored):
                raise _Refused(f"{name} has no such field", next(key for key in stored if key not in known))
            try:
                value = cls(**given)
            except Exception as error:
                raise _Refused(f"{name} raised {type(error).__name__}") from error
            for field, member in later.items():
                object.__setattr__(value, field, member)  # also where the class is frozen
            return value

        self.plans[cls] = plan = _Plan(name, encode, decode, (cls,), (dict,))
        try:
            hints = get_type_hints(cls)
        except Exception as error:
            raise OptionError(f"{name}: its annotations cannot be read ({type(error).__name__}: {error})") from error
        fields = dataclasses.fields(cls)
        for field in fields:
            member = self.plan(hints[field.name], f"{name}.{field.name}")
            required = field.init and field.default is field.default_factory is dataclasses.MISSING
            encoders.append((field.name, member.as_is, member.encode))
            decoders.append((field.name, member.as_is, member.decode, field.init, required))
            known.add(field.name)
        _check_constructor(cls, {field.name for field in fields if field.init})
        return plan


def _check_constructor(cls: type[Any], arguments: set[str]) -> None:
    """An instance has to be made from its fields: no required `InitVar`, and no `__init__` of another shape."""
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
    """A codec for the values of a type that msgspec knows: a Struct, a tagged union, an attrs class, ...

    What the type means is msgspec's to say, unknown members included: they are dropped, and removed by the next save,
    unless the Struct says ``forbid_unknown_fields=True``. `encode` converts each value there and back, and refuses it
    if it does not come back equal and of the same type; so values have to compare by content, which Structs do. An int
    in a float field becomes a float.

    Raises `MissingExtraError` without msgspec, and `OptionError` for a type it cannot handle. A call of `encode` costs
    about seven times `msgspec.json.encode`.
    """
    try:
        import msgspec  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError(
            'msgspec_codec needs msgspec: pip install "cagey-sessions[msgspec]"', extra="msgspec"
        ) from error
    try:
        msgspec.json.Decoder(kind)
    except TypeError as error:
        raise OptionError(f"msgspec_codec: {error}") from error

    def decode(stored: Any) -> Any:
        try:
            return msgspec.convert(stored, kind, str_keys=True)
        except msgspec.ValidationError as error:
            path, reason = _read_validation_error(error)
            raise EncodingError(f"{path}: {reason}", path=path) from error.__cause__

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
    """Path and reason of msgspec's error; the reason without anything of the data, which some of its messages quote."""
    reason, _, place = str(error).partition(" - at `")
    path = re.sub(r"\.([^.\[\]]+)", r'["\1"]', "user_data" + place[place.find("$") + 1 :].rstrip("`"))
    if error.__cause__ is not None:
        reason = f"refused with {type(error.__cause__).__name__}"
    elif not reason.startswith(("Expected `", "Object missing", "Object contains")):
        reason = "is not a value that its annotation allows"
    return path, reason
