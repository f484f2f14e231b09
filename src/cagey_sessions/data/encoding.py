"""From a user's data to its bytes and back. What lives here: the checks of that step, and the calls of a program's own
`encode` and `decode` in it. What must not: when to save, where to, any I/O.

What is stored is what comes back, of the same types, or the step is refused with the path of the offending value:

    value --encode=--> JSON value --exact check, orjson--> body        `Encoding.dump`
    value <--decode=-- JSON value <--exact check, orjson--- body       `Encoding.load`

A codec (`codecs.py`) is the pair of functions in the outer column; so are any two of a program's own.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, Protocol

from .._core import decode_plain, encode_plain
from ..errors import CorruptRecordError, EncodingError, NewerSchemaError, OptionError
from ..options import is_any
from ..user_code import END_OF_PROCESS
from ..wording import quote

__all__ = ["MAX_BYTES", "Encoding", "Stored"]

MAX_BYTES = 2**20
"""Of a body, unless the program says otherwise."""

LAST_SCHEMA = 2**31 - 1
"""Any engine keeps it as a plain integer."""


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
                raise OptionError(f"{name} is a function, not {quote(function)}")
            if is_any(function, inspect.iscoroutinefunction, inspect.isasyncgenfunction):
                raise OptionError(f"{name} is called in one step and cannot wait; make it a plain function")
        if type(schema) is not int or not 0 <= schema <= LAST_SCHEMA:
            raise OptionError(f"schema is a whole number from 0 to {LAST_SCHEMA}, not {quote(schema)}")
        if type(max_bytes) is not int or not 1 <= max_bytes <= sys.maxsize:
            raise OptionError(f"max_bytes is a whole number from 1 to {sys.maxsize}, not {quote(max_bytes)}")
        self._encode = encode
        self._decode = decode
        self._tells_schema = decode is not None and _has_parameter(decode, "schema")
        self.schema: int = schema
        self.max_bytes: int = max_bytes

    @property
    def converts(self) -> bool:
        """Whether a program's own functions have a part in it."""
        return self._encode is not None or self._decode is not None

    def try_dump(self, value: object) -> bytes | None:
        """The body of a value as it is now; None if it cannot be saved. O(size)."""
        try:
            return self.dump(value)
        except EncodingError:
            return None

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
        except END_OF_PROCESS:
            raise
        except BaseException as error:
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
        body, if it is not JSON, if a value cannot hold what it says (see `decode_plain`), if `decode` raises, or if the
        value is None. O(size).
        """
        if record.schema > self.schema:
            raise NewerSchemaError(
                f"the record of user {quote(record.user_id)} has schema {record.schema}, and this program reads up to "
                f"{self.schema}; run the newer program. The record is left as it is",
                user_id=record.user_id,
                schema=record.schema,
            )
        try:
            return self._read(record.body, record.schema)
        except EncodingError as error:
            raise CorruptRecordError(
                f"the record of user {quote(record.user_id)} cannot be read, and is left as it is: {error}",
                user_id=record.user_id,
                body=record.body,
                path=error.path,
            ) from error.__cause__

    def copy(self, value: object) -> Any:
        """A private copy of a value: what a load would return right after a save of it.

        Raises `EncodingError` if it cannot be saved, or not be loaded then. O(size).
        """
        return self._read(self.dump(value), self.schema)

    def _read(self, body: bytes, schema: int) -> Any:
        value = decode_plain(body)
        if self._decode is None:
            _refuse_none(value, "null stands for no data")
            return value
        try:
            value = self._decode(value, schema=schema) if self._tells_schema else self._decode(value)
        except EncodingError:
            raise
        except END_OF_PROCESS:
            raise
        except BaseException as error:
            raise EncodingError(f"user_data: decode raised {type(error).__name__}") from error
        _refuse_none(value, "decode returned None; it returns the user's data")
        _refuse_awaitable(value, "decode")
        return value


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes, after its first parameter, one that can be given by this name."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except Exception:  # some that are written in C do not tell, and others may raise anything
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
