"""`CallbackStore`: the program's own tables, by two functions that load and save users.

The functions may return anything, so every answer is checked here, and an error says what to return instead. Nothing is
kept about users: this store has no fence, and is for one process.
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
    """Users in your own tables, through two functions, or three. For one process: nothing keeps a second one out.

    ``load(user_id)`` returns the data of a user: plain values (dict with `str` keys, list, str, int, finite float,
    bool), or its JSON text as `bytes` or `str`, or None for a user who is new. A `str` is always taken for JSON text.
    If the function cannot tell, it has to raise: None after a failed read would give the user new, empty data.

    ``save_many(records)`` gets a list of `Record`, each of a different user, and writes `record.value()` or
    `record.body` for `record.user_id`. It returns None if all of them are saved, or a list with one answer for each, in
    order: None or True (saved), False (failed, to be repeated), an exception (failed, for this reason), an `Outcome` or
    its value, or a `Verdict`. If it raises, none counts as saved, and all are given to it again, later and in smaller
    lists. So writing a record twice must do no harm.

    ``erase(user_id)`` deletes a user, and returns False if there was none. Without it users cannot be erased.

    Each is a coroutine function, or a plain function that does not block, because it runs on the event loop; work that
    blocks goes into ``await asyncio.to_thread(...)``. They are called concurrently: one `claim_many` loads up to 16
    users at a time.

    Only the data is read back: a loaded record has schema 0, version 1 and `saved_at` 0.0. So `load` has to return data
    in the shape that the program reads today.

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
        """Do nothing: the program opens what its functions use."""

    async def close(self) -> None:
        """Do nothing: the program closes what its functions use."""

    async def claim_many(self, user_ids: Sequence[int | str], owner: str) -> list[Claim | StoreError]:
        """Load users, each once, and grant every claim.

        The answer for a user whose `load` raised is a `StoreError` that says so. If it failed for all of them, raises
        what it raised for the first, or `StoreContractError` if it returned something unusable.
        """
        answers: dict[int | str, Claim | StoreError] = {}
        failures: list[Exception] = []
        waiting = iter(dict.fromkeys(user_ids))

        async def work() -> None:
            for user_id in waiting:  # the tasks share the iterator, so each takes the next user
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
        """Give the program's `save_many` the latest record of each user. Does not call it without records.

        Raises what it raises, and `StoreContractError` for an answer that cannot be understood.
        """
        if not records:
            return []
        latest = latest_of(records)
        answer = await _call("save_many", self._save_many, list(latest.values()))
        verdicts = dict(zip(latest, _verdicts(answer, len(latest)), strict=True))
        return [verdicts[record.user_id] for record in records]

    async def release_many(self, claims: Sequence[tuple[int | str, int]], owner: str) -> list[bool]:
        """Return True for each: there is no claim to give up."""
        return [True] * len(claims)

    async def erase(self, user_id: int | str, owner: str = "") -> bool:
        """Call the program's `erase`, and return whether there was such a user.

        Raises `StoreModeError` if none was given, what it raises, and `StoreContractError` for an unusable answer.
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
        """Return the user's data as `load` does, with epoch 0 and no owner, which are not stored.

        Raises what `load` raises, and `StoreContractError` for an unusable answer.
        """
        return await self._read(user_id, 0, "")

    def scan(self) -> AsyncIterator[Record]:
        """Raise `StoreModeError`: there is no function that lists users."""
        raise StoreModeError("a CallbackStore cannot list its users; read them from your own tables")

    async def _claim(self, user_id: int | str, owner: str) -> Claim:
        self._epoch += 1  # nothing is stored, but a claim has to have an epoch above the last one
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
    """A function of the program was cancelled from outside, or raised something that is not an `Exception`."""


async def _call(name: str, function: Callable[[Any], object], argument: object) -> object:
    """Call a function of the program, and await what it returns if that is awaitable."""
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
    """The body of what `load` returned. Raises `StoreContractError` if it is not JSON."""
    if type(data) is bytes:
        return data
    if type(data) is str:
        with contextlib.suppress(UnicodeEncodeError):  # not raised on, nor as a context: it holds the whole text
            return data.encode()
        raise StoreContractError(f"load returned a str with a lone surrogate for user {quote(user_id)}")
    try:
        return encode_plain(data)
    except EncodingError as error:
        refused, path = str(error), error.path
    # outside of the `except`, so that the first error, whose traceback holds the data, is not its context
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
