"""Whose user it is. What lives here: loading users, and what is done with users who may not be on this server: reading,
editing, erasing. What must not: saving what is live, or how a claim is made (`claims.py`).

Order of a login: the user's turn is taken, so that nobody else in this process is at work on the same user; an older
session is saved and ended; the store is asked for the claim; the body is decoded and encoded again, for its digest; and
only then, in one synchronous step, the session gets its user and its data. Until that step there is nothing to save.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from typing import Any, NamedTuple

from .._core import SessionCore, check_user_id
from ..data.encoding import Encoding
from ..errors import (
    AlreadyIdentifiedError,
    CorruptRecordError,
    EncodingError,
    FencedError,
    OptionError,
    OwnedElsewhereError,
    SessionEndedError,
    StoreModeError,
    StoreUnavailableError,
    UnsavableError,
    UsageError,
    UserActiveError,
    UserErasedError,
    UserNotFoundError,
    WouldDeadlockError,
)
from ..events.deadlocks import Kind, Wait, would_deadlock
from ..options import SECOND, one_of
from ..ownership.claims import Claims
from ..records import EndReason
from ..saving.to_store import StoreSaver
from ..stores import Claim, Outcome, Record
from ..stores.contract import verdicts_of
from ..stores.link import StoreGateway
from ..stores.rows import check_record
from ..user_code import END_OF_PROCESS
from ..wording import quote
from .server import Lifecycle
from .spilling import Replay

__all__ = ["NO_DEFAULT", "Ownership"]


class _NoDefault:
    """What stands for a `default` that was not given, also where a signature is printed."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<no default>"


NO_DEFAULT: Any = _NoDefault()
WHEN_ACTIVE = ("replace", "refuse", "join")


class _Loaded(NamedTuple):
    """A user who is ours, and their data, before any session has them."""

    user_id: int | str
    epoch: int
    version: int  # 0 for a user who is new
    digest: int
    stored: int  # digest of the body as it is in the store
    data: Any
    losses: int  # that the engine had had before the claim


class Ownership:
    """What a manager and its sessions do with users of the store."""

    def __init__(self, life: Lifecycle, encoding: Encoding, claims: Claims, replay: Replay) -> None:
        self._life = life
        self._claims = claims
        self._replay = replay
        self._encoding = encoding
        self._identifying: set[SessionCore] = set()
        self._untaken: set[SessionCore] = set()
        """Sessions made by an `open` that no caller has been given yet."""

    def _require_store(self) -> StoreGateway:
        if self._life.gateway is None:
            raise StoreModeError(
                "this call needs a store: SessionManager(store=...); without one the program loads the data itself and "
                "hands it over with `await session.set_user(user_id, user_data)`"
            )
        return self._life.gateway

    @property
    def _gateway(self) -> StoreGateway:
        assert self._life.gateway is not None
        return self._life.gateway

    @property
    def _saver(self) -> StoreSaver:
        assert self._life.store_saver is not None
        return self._life.store_saver

    # Sessions

    async def login(self, session: SessionCore, user_id: int | str, default: Any, when_active: str) -> None:
        """See `Session.login`."""
        life = self._life
        life.enter()
        self._require_store()
        life.refuse_if_ending(session)
        self._check(user_id, default, when_active, ("replace", "refuse"))
        if session.user_id is not None or session in self._identifying:
            raise AlreadyIdentifiedError(f"this session has a user already, or is getting one ({session!r})")
        life.refuse_if_closed()
        self._identifying.add(session)
        try:
            async with self._claims.turn(user_id, self._patience_ends()):
                await self._make_room(user_id, when_active)
                loaded = await self._load(user_id, default)
                try:
                    life.refuse_if_ending(session)
                    life.refuse_if_closed()
                    self._identify(session, loaded)
                except BaseException:
                    self._claims.let_go(loaded.user_id, loaded.epoch)
                    raise
        finally:
            self._identifying.discard(session)
        await life.emit_identified(session, user_id, session.user_data)

    async def open(self, user_id: int | str, default: Any, when_active: str) -> SessionCore:
        """See `SessionManager.open`."""
        life = self._life
        life.enter()
        self._require_store()
        self._check(user_id, default, when_active, WHEN_ACTIVE)
        life.refuse_if_closed()
        joins = when_active == "join"
        if joins and (live := self._join(user_id)) is not None:
            return live
        async with self._claims.turn(user_id, self._patience_ends()):
            if joins and (live := self._join(user_id)) is not None:
                return live  # a call that had the turn before has made it
            await self._make_room(user_id, when_active)
            loaded = await self._load(user_id, default)
            try:
                session = await life.create(None, False)
                try:
                    life.refuse_if_ending(session)
                    life.refuse_if_closed()
                    self._identify(session, loaded)
                except BaseException:
                    await self._end_quietly(session)
                    raise
            except BaseException:
                self._claims.let_go(loaded.user_id, loaded.epoch)
                raise
        self._untaken.add(session)
        try:
            await life.emit_identified(session, user_id, session.user_data)
        except asyncio.CancelledError:
            self._abandon(session, user_id)
            raise
        except BaseException:
            self._untaken.discard(session)
            raise
        self._untaken.discard(session)
        return session

    def _patience_ends(self) -> int:
        """Until when a call that begins now waits for its turn with a user."""
        return self._life.clock.now() + self._life.options.save_timeout

    def _join(self, user_id: int | str) -> SessionCore | None:
        """The live session of a user, for a call that is given it."""
        live = self._life.table.find_by_user(user_id)
        if live is not None:
            self._untaken.discard(live)
        return live

    def _abandon(self, session: SessionCore, user_id: int | str) -> None:
        """The `open` that has made a session was cancelled: end it, unless another call has been given it meanwhile.

        At once, so that no call finds it any more; but an edit under way, which has the turn, comes to its end first.
        """
        if self._claims.is_at_work(user_id):
            self._life.spawn(self._abandon_later(session, user_id), "abandoned session", Context())
        else:
            self._end_untaken(session)

    async def _abandon_later(self, session: SessionCore, user_id: int | str) -> None:
        try:
            async with self._claims.turn(user_id):
                pass
        finally:
            self._end_untaken(session)

    def _end_untaken(self, session: SessionCore) -> None:
        if session not in self._untaken:
            return
        self._untaken.discard(session)
        endings = self._life.endings
        if not self._life.table.is_ending(session) and not endings.end_at_once(session, EndReason.DESTROYED):
            endings.begin_end(session, False, EndReason.DESTROYED)

    async def _end_quietly(self, session: SessionCore) -> None:
        with suppress(Exception):  # it has been reported where it was raised
            await self._life.endings.end(session, False)

    def _identify(self, session: SessionCore, loaded: _Loaded) -> None:
        self._life.autosave.identify(session, loaded.user_id, loaded.data)
        if loaded.version and loaded.losses != self._gateway.losses:
            # the engine may have an older record by now: what was loaded counts as changed
            self._life.table.own(session, loaded.epoch, loaded.version, loaded.stored ^ 1, loaded.stored)
            session.mark_changed()
        elif loaded.version:
            self._life.table.own(session, loaded.epoch, loaded.version, loaded.digest, loaded.stored)
        else:
            self._life.table.own(session, loaded.epoch)

    async def _make_room(self, user_id: int | str, when_active: str) -> None:
        """Have no session of the user in this process: its last save is acknowledged when this returns."""
        life = self._life
        while (older := life.table.active_session(user_id)) is not None:
            if not life.table.is_ending(older):
                if when_active == "refuse":
                    raise UserActiveError(f"user {quote(user_id)} has a live session", session=older)
                # a save, and then an end; each of them has the patience of a caller
                if not await self._within_patience(life.replace(older), 2 * self._gateway.timeout + SECOND):
                    raise StoreUnavailableError(
                        f"the earlier session of user {quote(user_id)} has not ended: its last save is not "
                        "acknowledged, or a listener of its end has not returned; try again later"
                    )
                continue
            ending = life.endings.under_way.get(older)
            if ending is not None and ending.parked:
                life.endings.resume(older, ending)  # somebody waits now
            if not await self._within_patience(life.endings.wait_ended(older), self._gateway.timeout):
                raise StoreUnavailableError(
                    f"the last save of the earlier session of user {quote(user_id)} is not acknowledged; "
                    "try again later"
                )

    async def _within_patience(self, waiting: Coroutine[Any, Any, object], limit: int) -> bool:
        """Await something for so many nanoseconds: whether it came to its end."""
        task = self._life.spawn(waiting, "wait")
        try:
            await self._gateway.wait_for(task, limit)
            if not task.done() or task.cancelled():
                return False
            task.result()
            return True
        finally:
            if not task.done():
                task.cancel()

    # Users who may not be here

    async def read(self, user_id: int | str) -> Any:
        """See `SessionManager.read`."""
        life = self._life
        life.enter()
        gateway = self._require_store()
        check_user_id(user_id, life.options.user_id)
        session = life.table.active_session(user_id)
        if session is not None and await self._has_the_newest(session):
            return self._encoding.copy(session.user_data)
        record = await self._claims.persistently(lambda _: gateway.ask(gateway.store.load, user_id))
        if record is None:
            raise _not_found(user_id)
        return self._decode(check_record(record))

    async def _has_the_newest(self, session: SessionCore) -> bool:
        """Whether nobody can have saved the user of a session since it was loaded.

        One that is ending may have let go of the user already, by a last save whose reply was lost.
        """
        life, gateway, user_id = self._life, self._gateway, session.user_id
        if not session.alive or life.endings.loss_of(session) is not None:
            return False
        if not gateway.store.shared or not life.table.is_ending(session):
            return True
        ours = (life.owner, life.table.epoch(session))
        assert user_id is not None
        holder = await self._claims.persistently(lambda _: gateway.ask(gateway.store.holder, user_id))
        return holder == ours and session.alive

    @asynccontextmanager
    async def edit(self, user_id: int | str, default: Any) -> AsyncIterator[Any]:
        """See `SessionManager.edit`."""
        life = self._life
        life.enter()
        self._require_store()
        self._check(user_id, default, "join", WHEN_ACTIVE)
        life.refuse_if_closed()
        async with self._claims.turn(user_id, self._patience_ends()) as frame:
            live = life.table.find_by_user(user_id)
            if live is not None:
                frame.confine()
                async with self._edit_live(live) as data:
                    yield data
                return
            await self._make_room(user_id, "replace")
            loaded = await self._load(user_id, default)
            try:
                frame.confine()
                yield loaded.data
                body = self._encoding.dump(loaded.data)
                if loaded.version and self._life.identity.digest(body) == loaded.digest:
                    self._claims.let_go(user_id, loaded.epoch)
                else:
                    await self._write(loaded, body)
            except BaseException:
                self._claims.let_go(user_id, loaded.epoch)
                raise

    @asynccontextmanager
    async def _edit_live(self, session: SessionCore) -> AsyncIterator[Any]:
        session.mark_changed()
        data = session.user_data
        before = self._saver.fingerprint(data)
        try:
            yield data
        finally:
            with suppress(SessionEndedError):
                session.mark_changed()  # what a block that raises has changed stays changed
        if session.user_data is not data and self._saver.fingerprint(data) != before:
            raise UsageError(
                f"user_data was assigned while user {quote(session.user_id)} was being edited: what this edit has "
                "changed is not in it; edit again"
            )
        await self._life.persist(session)

    async def _write(self, loaded: _Loaded, body: bytes) -> None:
        """Save a user who has no session, and let go of them."""
        gateway = self._gateway
        user_id = loaded.user_id
        record = Record(
            user_id,
            loaded.epoch,
            self._life.owner,
            loaded.version + 1,
            self._encoding.schema,
            body,
            time.time(),
            gateway.store.shared,
        )

        may_be_written = False

        async def save(_: int) -> None:
            nonlocal record, may_be_written
            try:
                answer = await gateway.write([record]).answer()
            except Exception:
                may_be_written = True
                raise
            ((outcome, detail),) = verdicts_of(gateway.store, answer, 1)
            if outcome == Outcome.FENCED:
                lost = _taken_over(user_id, may_be_written)
                if not gateway.store.fenced or record.epoch != loaded.epoch:
                    raise lost
                epoch = await self._claim_again(loaded, record, lost)
                if epoch is None:
                    return
                record = record._replace(epoch=epoch)
                raise StoreUnavailableError(f"user {quote(user_id)} had to be claimed again")
            if outcome == Outcome.ERASED:
                raise UserErasedError(f"user {quote(user_id)} was erased meanwhile", user_id=user_id)
            if outcome == Outcome.INVALID:
                raise UnsavableError(f"the store refuses the data of user {quote(user_id)}: {detail}", user_id=user_id)
            if outcome not in (Outcome.SAVED, Outcome.ALREADY):
                raise StoreUnavailableError(f"{gateway.name} could not save user {quote(user_id)}: {detail or outcome}")

        await self._claims.persistently(save)

    async def _claim_again(self, loaded: _Loaded, record: Record, lost: FencedError) -> int | None:
        """After a refusal by the fence, perhaps because of a late claim of our own: the epoch to write under.

        None if an attempt that had no answer has written the record. Raises `lost` if somebody else has the user or has
        written.
        """
        try:
            claim = await self._claims.claim(loaded.user_id)
        except OwnedElsewhereError:
            raise lost from None
        found = (
            (0, 0) if claim.record is None else (claim.record.version, self._life.identity.digest(claim.record.body))
        )
        if found == (loaded.version, loaded.stored):
            return claim.epoch
        self._claims.let_go(loaded.user_id, claim.epoch)
        if found != (record.version, self._life.identity.digest(record.body)):
            raise lost
        return None

    async def erase(self, user_id: int | str) -> bool:
        """See `SessionManager.erase`."""
        life = self._life
        life.enter()
        gateway = self._require_store()
        check_user_id(user_id, life.options.user_id)
        if not gateway.store.can_erase:
            raise StoreModeError(
                f"this {gateway.name} cannot erase users; give it a function: CallbackStore(load, save_many, erase=...)"
            )
        session = life.table.active_session(user_id)
        if session is not None and would_deadlock(Wait(session, Kind.END)):
            raise WouldDeadlockError("this listener would wait for an end that waits for this listener")
        async with self._claims.turn(user_id, self._patience_ends()):
            if not gateway.store.fenced:  # then the last write has to come first
                await self._claims.persistently(
                    lambda _: gateway.ask(gateway.store.load, user_id)
                )  # is it there at all?
                await self._end_erased(user_id)

            async def erase(_: int) -> bool:
                await self._claims.outlast(user_id)
                return await gateway.erase(user_id, life.owner).answer()

            erased = await self._claims.persistently(erase)
            await self._end_erased(user_id)
            if life.spill is not None and life.spill.drop(user_id):
                await self._replay.write_spill()
            return erased

    async def _end_erased(self, user_id: int | str) -> None:
        while (session := self._life.table.active_session(user_id)) is not None:
            self._life.endings.end_unsaved(
                session, UserErasedError(f"user {quote(user_id)} was erased", user_id=user_id)
            )
            await self._life.endings.wait_ended(session)

    def _check(self, user_id: int | str, default: Any, when_active: str, known: tuple[str, ...]) -> None:
        """Bad input gets its error before anything changes."""
        check_user_id(user_id, self._life.options.user_id)
        one_of("when_active", when_active, known)
        if default is not NO_DEFAULT and not callable(default):
            self._encoding.dump(default)

    # Claims

    async def _load(self, user_id: int | str, default: Any) -> _Loaded:
        """Claim a user and read or make their data. If that fails, the user is let go of."""
        await self._claims.outlast(user_id)
        losses = self._gateway.losses
        claim = await self._claims.claim(user_id)
        try:
            claim = await self._replay.see(claim)
            if claim.record is not None:
                data = self._decode(claim.record)
                version = max(claim.record.version, 1)
            elif default is NO_DEFAULT:
                raise _not_found(user_id)
            else:
                data = _made(default) if callable(default) else self._encoding.copy(default)
                version = 0
            digest = self._life.identity.digest
            stored = 0 if claim.record is None else digest(claim.record.body)
            return _Loaded(user_id, claim.epoch, version, digest(self._dump(claim, data)), stored, data, losses)
        except BaseException:
            self._claims.let_go(user_id, claim.epoch)
            raise

    def _dump(self, claim: Claim, data: Any) -> bytes:
        try:
            return self._encoding.dump(data)
        except EncodingError as error:
            if claim.record is None:
                raise  # it is the default
            raise CorruptRecordError(
                f"the record of user {quote(claim.user_id)} can be read but not be written again, and is left as it "
                f"is: {error}",
                user_id=claim.user_id,
                body=claim.record.body,
                path=error.path,
            ) from error

    def _decode(self, record: Record) -> Any:
        if not self._gateway.store.keeps_schema:
            record = record._replace(schema=self._encoding.schema)
        return self._encoding.load(record)


def _made(default: Callable[[], Any]) -> Any:
    try:
        data = default()
    except (Exception, *END_OF_PROCESS):
        raise
    except BaseException as error:
        raise OptionError(f"default raised {type(error).__name__}; it returns data, or raises an Exception") from error
    if inspect.isawaitable(data):
        if inspect.iscoroutine(data):
            data.close()
        raise OptionError(
            "default is a value, or a plain function that makes one; this one returned something to await"
        )
    return data


def _taken_over(user_id: int | str, may_be_written: bool) -> FencedError:
    outcome = "whether this edit was written before that is not known" if may_be_written else "nothing was written"
    return FencedError(f"another server has taken over user {quote(user_id)}; {outcome}", user_id=user_id)


def _not_found(user_id: int | str) -> UserNotFoundError:
    return UserNotFoundError(
        f"the store has no user {quote(user_id)}; give a default, a value or a function that makes one, to begin anew"
    )
