"""Two functions around tables that are there already. What lives here: the store that calls them, and every check of
what they return. What must not: any SQL, any retry, anything kept per user.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from .._core import encode_plain
from ..errors import EncodingError, OptionError, StoreContractError, StoreError, StoreModeError, StoreUnavailableError
from ..options import is_any
from ..user_code import current_task, is_for_this_task
from ..wording import quote
from .contract import Claim, Outcome, Record, Store, Verdict, latest_of

__all__ = ["CallbackStore", "Erase", "Load", "SaveMany", "Saved"]

LOADS_AT_A_TIME = 16

Answer: TypeAlias = Verdict | Outcome | str | bool | BaseException | None
Saved: TypeAlias = list[Any] | tuple[Answer, ...] | None
"""What became of a list of records: None if all are saved, else one answer for each, in order."""
Load: TypeAlias = Callable[[Any], object]
SaveMany: TypeAlias = Callable[[list[Record]], Awaitable[Saved] | Saved]
Erase: TypeAlias = Callable[[Any], Awaitable[bool | None] | bool | None]


class CallbackStore(Store):
    """Your own tables, through two functions or three. For one process: nothing here keeps a second one out.

    ``load(user_id)`` returns the data of a user: plain values (dict with `str` keys, list, str, int, finite float,
    bool), or the JSON text of it as `bytes` or `str`, or None for a user who is new. A `str` is always taken for JSON
    text. Where it cannot tell it has to raise: a failed read is never "new".

    ``save_many(records)`` gets a list of `Record`, each of another user, and writes `record.value()` or `record.body`
    of `record.user_id`. It returns None when all of them are saved, or a list with one answer for each, in order: None
    or True (saved), False (failed, and to be repeated), an exception (failed, for this reason), an `Outcome` or its
    value, or a `Verdict`. If it raises, none counts as saved, and all are handed to it again, later and in smaller
    lists: to write a record twice must do no harm.

    ``erase(user_id)`` deletes a user, and returns False if there was none. Without it users cannot be erased.

    Each is a coroutine function, or a plain one that does not block, because it runs on the event loop; what blocks
    goes into ``await asyncio.to_thread(...)``. They are called concurrently. One `claim_many` loads up to 16 users at a
    time.

    Only the data is read back: a loaded record has schema 0, version 1 and `saved_at` 0.0. `load` returns data in the
    shape the program reads today.

    Raises `OptionError` for an argument that cannot be called, or is a generator function.
    """

    fenced = False
    shared = False
    independent = True
    keeps_schema = False
    loss_class = "as your functions and their database give"

    def __init__(self, load: Load, save_many: SaveMany, *, erase: Erase | None = None) -> None:
        _check_function("load", load)
        _check_function("save_many", save_many)
        if erase is not None:
            _check_function("erase", erase)
        self._load = load
        self._save_many = save_many
        self._erase = erase
        self.can_erase: bool = erase is not None
        self._epoch = 0

    async def open(self) -> None:
        """Do nothing: what the functions use is the program's."""

    async def close(self) -> None:
        """Do nothing: what the functions use is the program's."""

    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> list[Claim | StoreError]:
        """Load users, each once, and grant every claim.

        The answer for a user whose `load` raised is a `StoreError` that says so. Raises what `load` raised, or
        `StoreContractError`, if it failed for all of them.
        """
        answers: dict[int | str, Claim | StoreError] = {}
        failures: list[Exception] = []
        waiting = iter(dict.fromkeys(user_ids))

        async def work() -> None:
            for user_id in waiting:  # one iterator for all the workers
                try:
                    answers[user_id] = await self._claim(user_id, owner)
                except Exception as error:
                    failures.append(error)
                    answers[user_id] = _failed_load(user_id, error)

        if len(user_ids) <= 1:
            await work()
        else:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(user_ids), LOADS_AT_A_TIME)):
                    group.create_task(work(), name="cagey-sessions load")
        if failures and len(failures) == len(answers):
            raise failures[0]
        return [answers[user_id] for user_id in user_ids]

    async def save_many(self, records: Sequence[Record]) -> list[Verdict]:
        """Hand records to the program's `save_many`, of each user only the latest; nothing is called for no records.

        What it raises is raised as it is. Raises `StoreContractError` for an answer that cannot be understood.
        """
        if not records:
            return []
        latest = latest_of(records)
        answer = await _call("save_many", self._save_many, list(latest.values()))
        verdicts = dict(zip(latest, _verdicts(answer, len(latest)), strict=True))
        return [verdicts[record.user_id] for record in records]

    async def release_many(self, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
        """True for each: nobody else can have the user."""
        return [True] * len(claims)

    async def erase(self, user_id: int | str, owner: str = "") -> bool:
        """Have the program erase a user: whether there was one.

        Raises `StoreModeError` where no `erase` was given, and what it raised.
        """
        if self._erase is None:
            raise StoreModeError(
                "this CallbackStore cannot erase users; give it a function: CallbackStore(load, save_many, erase=...)"
            )
        answer = await _call("erase", self._erase, user_id)
        if answer is not None and not isinstance(answer, bool):
            raise StoreContractError(
                f"erase returned {_kind(answer)}; return True or None if the user is erased, False if there was none"
            )
        return answer is not False

    async def load(self, user_id: int | str) -> Record | None:
        """The user's data as `load` returns it; epoch and owner are not known here: 0 and empty.

        Raises what `load` raised, or `StoreContractError`.
        """
        return await self._read(user_id, 0, "")

    def scan(self) -> AsyncIterator[Record]:
        """Raises `StoreModeError`: there is no function that lists users."""
        raise StoreModeError("a CallbackStore cannot list its users; read them from your own tables")

    async def _claim(self, user_id: int | str, owner: str) -> Claim:
        self._epoch += 1
        epoch = self._epoch
        return Claim(user_id, epoch, await self._read(user_id, epoch, owner))

    async def _read(self, user_id: int | str, epoch: int, owner: str) -> Record | None:
        data = await _call("load", self._load, user_id)
        if data is None:
            return None
        return Record(user_id, epoch, owner, 1, 0, _body(user_id, data), 0.0)


def _check_function(name: str, function: object) -> None:
    if not callable(function):
        raise OptionError(f"{name} is a function or another callable, not {_kind(function)}")
    for code in (function, type(function).__call__):
        if is_any(code, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
            raise OptionError(f"{name} has a `yield` in it, so that it does nothing when it is called; use `return`")


class FunctionInterruptedError(Exception):
    """A function of the program's was cancelled from outside, or raised what is no `Exception`."""


async def _call(name: str, function: Callable[[Any], object], argument: object) -> object:
    task = current_task()
    try:
        result = function(argument)
        return await result if inspect.isawaitable(result) else result
    except Exception:
        raise
    except BaseException as error:
        if is_for_this_task(error, task):
            raise
        what = "was cancelled from outside" if isinstance(error, asyncio.CancelledError) else "was interrupted"
        raise FunctionInterruptedError(f"{name} {what}; what it has done is unknown") from error


def _failed_load(user_id: int | str, error: Exception) -> StoreError:
    if isinstance(error, StoreError):
        return error
    failed = StoreUnavailableError(f"load raised {type(error).__name__} for user {quote(user_id)}")
    failed.__cause__ = error
    return failed


def _body(user_id: int | str, data: object) -> bytes:
    """What `load` returned, as a record keeps it."""
    if type(data) is bytes:
        return data
    if type(data) is str:
        with contextlib.suppress(UnicodeEncodeError):  # left behind here: it holds the whole text
            return data.encode()
        raise StoreContractError(f"load returned a str with a lone surrogate for user {quote(user_id)}")
    try:
        return encode_plain(data)
    except EncodingError as error:
        refused, path = str(error), error.path
    raise StoreContractError(
        f"load returned what is not JSON for user {quote(user_id)}: {refused}; return the data as dict, list, str, "
        "int, float, bool and None, or as JSON text (bytes or str), or None for a user who is new",
        path=path,
    )


def _verdicts(answer: object, count: int) -> list[Verdict]:
    if answer is None:
        return [Verdict(Outcome.SAVED)] * count
    if not isinstance(answer, list | tuple) or isinstance(answer, Verdict):
        raise StoreContractError(
            f"save_many returned {_kind(answer)}; return None when all are saved, or a list with one answer per record"
        )
    if len(answer) != count:
        raise StoreContractError(f"save_many returned {len(answer)} answers for {count} records; return one for each")
    return [_verdict(each) for each in answer]


def _verdict(answer: object) -> Verdict:
    match answer:
        case None | True:
            return Verdict(Outcome.SAVED)
        case False:
            return Verdict(Outcome.FAILED)
        case BaseException():
            return Verdict(Outcome.FAILED, type(answer).__name__)
        case str() if answer in _OUTCOMES:
            return Verdict(Outcome(answer))
        case Verdict(outcome=str(outcome), detail=str(detail)) if outcome in _OUTCOMES:
            return Verdict(Outcome(outcome), detail)
    kind = "a str that is no outcome" if isinstance(answer, str) else _kind(answer)
    raise StoreContractError(
        f"save_many returned {kind} for a record; return None or True (saved), False or an exception (failed), "
        f"a Verdict, or one of {', '.join(map(repr, _OUTCOMES))}"
    )


_OUTCOMES = tuple(outcome.value for outcome in Outcome)


def _kind(value: object) -> str:
    kind = type(value)
    where = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"a value of type {where}{kind.__qualname__}"
