"""Encodes a user's data as JSON bytes, and decodes it, with the program's own `encode` and `decode` in between.

A value that is loaded equals the one that was saved, and is of the same type throughout. A value for which that would
not hold is refused, with its path:

    value --encode=--> JSON value --exact check, orjson--> body        `Encoding.dump`
    value <--decode=-- JSON value <--exact check, orjson--- body       `Encoding.load`

`encode` and `decode` are any two functions of the program's, or the two of a codec. See also `codecs.py`, which makes
codecs from types, and `core/values.pxi`, which does the exact check.
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
"""The most bytes of a body, unless the program sets another limit."""

LAST_SCHEMA = 2**31 - 1
"""The highest schema number: every engine can keep it in a plain 32-bit integer."""


class Stored(Protocol):
    """The fields of a record that decoding needs."""

    @property
    def user_id(self) -> int | str: ...
    @property
    def schema(self) -> int: ...
    @property
    def body(self) -> bytes: ...


class Encoding:
    """How one program encodes the data of its users, and decodes it.

    `encode` turns the data into a JSON value, and `decode` turns a JSON value back into the data. Both are plain
    functions that take the value alone; but a `decode` with a parameter named ``schema`` also gets the number stored
    with the body, so that it can read what older versions of the program wrote. Without `encode` the data itself has to
    be a JSON value. `schema`, from 0 to 2**31 - 1, is the number stored with what is written from now on. `max_bytes`
    is the largest size of a body.

    Raises `OptionError` for an argument that is none of that.
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
        """Whether the program has given a function of its own, `encode` or `decode`."""
        return self._encode is not None or self._decode is not None

    def try_dump(self, value: object) -> bytes | None:
        """As `dump`, but returns None for a value that cannot be saved. O(size)."""
        try:
            return self.dump(value)
        except EncodingError:
            return None

    def dump(self, value: object) -> bytes:
        """Encode a value as it is now, and return its body.

        Raises `EncodingError` if `encode` raises anything, or if it returns None, something that is not exactly JSON,
        or more than `max_bytes`; only `KeyboardInterrupt` and `SystemExit` of `encode` are let through. O(size): about
        1.2 times what orjson alone takes, on data that is not in the processor's caches.
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
        except BaseException as error:  # `encode` may raise anything, and it concerns this user only
            raise EncodingError(f"user_data: encode raised {type(error).__name__}") from error
        _refuse_none(value, "encode returned None; it returns the JSON value to store")
        try:
            return encode_plain(value, self.max_bytes)
        except EncodingError:
            _refuse_awaitable(value, "encode")  # an `async def` is a likelier cause; looked for only after a failure
            raise

    def load(self, record: Stored) -> Any:
        """Decode the body of a record, and return the data.

        Raises `NewerSchemaError` if a newer version of the program wrote it. Raises `CorruptRecordError`, which holds
        the body, if it is not JSON, if it says a number or a text that Python cannot represent exactly (see
        `decode_plain`), if `decode` raises anything, or if the data is None. O(size).
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
            ) from error.__cause__  # the error itself only repeats what the text says

    def copy(self, value: object) -> Any:
        """Copy a value: return what a load would return after a save of it.

        Raises `EncodingError` if the value cannot be saved, or could not be loaded again. O(size).
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
    """Whether a function has, after its first parameter, one that can be passed by this name."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except Exception:  # functions written in C may have no signature, and callables of the program's may raise anything
        return False
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(parameter.name == name and parameter.kind in by_name for parameter in parameters)


def _refuse_none(value: object, reason: str) -> None:
    if value is None:
        raise EncodingError(f"user_data: {reason}")


def _refuse_awaitable(value: object, name: str) -> None:
    if hasattr(type(value), "__await__"):
        if isinstance(value, types.CoroutineType):
            value.close()  # or Python warns that it was never awaited
        raise EncodingError(f"user_data: {name} returned an awaitable; it is called in one step and cannot wait")
