"""`login`: a user is claimed, loaded and identified, or refused with nothing changed."""

from __future__ import annotations

import asyncio
import gc
import math

import pytest

from cagey_sessions import (
    AlreadyIdentifiedError,
    CorruptRecordError,
    EncodingError,
    EndReason,
    InvalidUserIdError,
    ManagerClosedError,
    NewerSchemaError,
    NotIdentifiedError,
    OptionError,
    OwnedElsewhereError,
    SessionEndedError,
    SessionManager,
    StoreError,
    StoreModeError,
    StoreUnavailableError,
    UnknownEventError,
    UserActiveError,
    UserNotFoundError,
)
from support import ScriptedStore, changed, end, inside, let_time_pass, turns


async def test_login_owns_loads_and_identifies(clock, store, manager):
    store.put("alice", b'{"gold":7}', version=41)
    heard = []
    manager.on("identified", lambda session, user_id, data: heard.append((session, user_id, data)))
    session = await manager.create("key")
    with pytest.raises(NotIdentifiedError):
        session.user_data["gold"] += 1
    await session.login("alice")
    assert (session.user_id, session.user_data) == ("alice", {"gold": 7})
    assert heard == [(session, "alice", {"gold": 7})]
    assert manager.find_by_user("alice") is session
    assert store.owner_of("alice") == inside(manager).owner
    session.user_data["gold"] += 1
    receipt = await session.persist_now()
    assert (receipt.version, receipt.changed, receipt.store) == (42, True, "ScriptedStore")
    assert store.stored("alice") == {"gold": 8}
    again = await session.persist_now()
    assert (again.version, again.changed) == (42, False)
    assert len(store.batches) == 1
    await session.destroy()
    assert store.owner_of("alice") == "", "let go of"
    await end(clock, manager)


async def test_a_default_is_a_value_of_which_each_gets_a_copy_or_a_function(clock, store, manager):
    default = {"bag": []}
    first, second, third = [await manager.create() for _ in range(3)]
    await first.login(1, default=default)
    await second.login(2, default=default)
    await third.login(3, default=lambda: {"made": True})
    first.user_data["bag"].append("sword")
    assert second.user_data == default == {"bag": []}
    assert third.user_data == {"made": True}
    await end(clock, manager)
    assert [store.stored(user_id) for user_id in (1, 2, 3)] == [{"bag": ["sword"]}, {"bag": []}, {"made": True}]


async def test_an_unknown_user_without_a_default_is_not_found_and_released(clock, store, manager):
    session = await manager.create()
    with pytest.raises(UserNotFoundError, match="'zoe'"):
        await session.login("zoe")
    assert session.user_id is None
    await turns()
    assert store.owner_of("zoe") == ""
    await session.login("zoe", default={})
    await end(clock, manager)


async def test_a_user_who_is_live_on_another_node_stays_there(clock, store, manager):
    other = SessionManager(store=ScriptedStore(clock, backing=store.backing), clock=clock)
    there = await other.create()
    await there.login(1, default={"n": 1})
    here = await manager.create()
    with pytest.raises(OwnedElsewhereError) as refused:
        await here.login(1, default={})
    assert refused.value.owner == inside(other).owner
    assert here.user_id is None
    await there.destroy()
    await here.login(1)
    assert here.user_data == {"n": 1}
    await end(clock, manager, other)


async def test_a_login_replaces_the_older_session_once_that_is_saved(clock, store, manager):
    older, newer = await manager.create(), await manager.create()
    await older.login(1, default={"n": 0})
    older.user_data["n"] = 5
    store.script = ["50ms"]
    await let_time_pass(clock, newer.login(1))
    assert newer.user_data == {"n": 5}
    assert older.end_reason == EndReason.REPLACED
    assert manager.find_by_user(1) is newer
    await end(clock, manager)


async def test_a_login_that_cannot_save_the_older_session_leaves_it_live(clock, store, manager):
    older, newer = await manager.create(), await manager.create()
    await older.login(1, default={"n": 0})
    older.user_data["n"] = 5
    store.down = True
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, newer.login(1))
    assert older.alive
    assert manager.find_by_user(1) is older
    assert newer.user_id is None
    store.down = False
    await clock.advance("2s")
    await let_time_pass(clock, newer.login(1))
    assert newer.user_data == {"n": 5}
    await end(clock, manager)


async def test_a_login_may_refuse_instead(clock, manager):
    older, newer = await manager.create(), await manager.create()
    await older.login(1, default={})
    with pytest.raises(UserActiveError) as refused:
        await newer.login(1, when_active="refuse")
    assert refused.value.session is older
    assert older.alive
    await end(clock, manager)


async def test_a_session_gets_one_user(clock, store, manager):
    session = await manager.create()
    store.claim_script = ["50ms"]
    first = asyncio.ensure_future(session.login(1, default={}))
    await turns()
    with pytest.raises(AlreadyIdentifiedError):
        await session.login(2, default={})
    await let_time_pass(clock, first)
    with pytest.raises(AlreadyIdentifiedError):
        await session.login(1)
    assert 2 not in store.backing.rows
    await end(clock, manager)


@pytest.mark.parametrize("count", [2, 5])
async def test_logins_of_one_user_at_once_end_with_one_session(clock, store, manager, count):
    sessions = [await manager.create() for _ in range(count)]
    await let_time_pass(clock, asyncio.gather(*(session.login(1, default={"n": 0}) for session in sessions)))
    assert [session.alive for session in sessions].count(True) == 1
    assert sum(session.end_reason == EndReason.REPLACED for session in sessions) == count - 1
    await end(clock, manager)


@pytest.mark.guarantee("I8")
async def test_nothing_is_there_to_save_before_the_load_has_finished(clock, store, manager):
    store.put(1, b'{"gold":9}')
    before = store.backing.rows[1].record
    session = await manager.create()
    store.claim_script = ["1s"]
    task = asyncio.ensure_future(session.login(1, default={}))
    await clock.advance("100ms")
    with pytest.raises(NotIdentifiedError):
        session.user_data["gold"] = 1
    await manager.persist_all_user_data()
    destroying = asyncio.ensure_future(session.destroy())
    await turns()
    with pytest.raises(SessionEndedError):
        await let_time_pass(clock, task)
    await destroying
    await turns()
    assert store.backing.rows[1].record == before
    assert store.owner_of(1) == ""
    assert not store.batches
    await end(clock, manager)


async def test_a_cancelled_login_sets_no_user_and_its_claim_is_released(clock, store, manager):
    """At each of its steps; the next login works."""
    for step in range(40):
        store.claim_script = ["10ms"]
        session = await manager.create()
        task = asyncio.ensure_future(session.login(1, default={"n": 0}))
        for _ in range(step):
            await asyncio.sleep(0)
            if step > 20:
                await clock.advance("1ms")
        done = task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await clock.advance("100ms")
        if session.user_id is None:
            assert not done
            assert store.owner_of(1) == "", f"after step {step}"
        await let_time_pass(clock, session.destroy())
    store.claim_script = []
    session = await manager.create()
    await session.login(1, default={})
    await end(clock, manager)


async def test_a_load_that_fails_is_never_a_new_user(clock, store, manager):
    store.put(1, b'{"gold":9}')
    store.claim_script = [OSError("no route"), ValueError("what"), StoreUnavailableError("later")] * 50
    session = await manager.create()
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.login(1, default={"gold": 0}))
    store.claim_script = []
    await let_time_pass(clock, session.login(1, default={"gold": 0}))
    assert session.user_data == {"gold": 9}
    await end(clock, manager)


async def test_a_login_waits_while_the_store_is_away_for_a_moment(clock, store, manager):
    store.put(1, b'{"gold":9}')
    session = await manager.create()
    store.down = True
    task = asyncio.ensure_future(session.login(1))
    await clock.advance("5s")
    assert not task.done()
    store.down = False
    await clock.advance("1100ms")
    await task
    assert session.user_data == {"gold": 9}
    await end(clock, manager)


async def test_a_login_gives_up_after_the_save_timeout(clock, store, manager):
    session = await manager.create()
    store.down = True
    before = clock.now()
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.login(1, default={}))
    assert 9 <= (clock.now() - before) / 1e9 <= 10.5
    store.down = False
    await clock.advance("2s")
    store.claim_script = ["hang"]
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.login(1, default={}))
    store.release_all.set()
    await end(clock, manager)


@pytest.mark.parametrize(
    ("body", "schema", "error"),
    [
        (b'{"gold":', 0, CorruptRecordError),
        (b"\xff\xfe", 0, CorruptRecordError),
        (b"null", 0, CorruptRecordError),
        (b'{"gold":1}', 7, NewerSchemaError),
    ],
)
async def test_data_that_cannot_be_read_starts_no_session_and_is_kept(clock, store, manager, body, schema, error):
    store.put(1, body, schema=schema)
    session = await manager.create()
    with pytest.raises(error) as raised:
        await session.login(1, default={})
    assert raised.value.user_id == 1
    if error is CorruptRecordError:
        assert raised.value.body == body
    assert session.user_id is None
    await turns()
    assert store.owner_of(1) == ""
    await end(clock, manager)
    assert store.backing.rows[1].record.body == body


class Odd(ScriptedStore):
    """A store of somebody's own that answers for some users as it is told."""

    def __init__(self, clock):
        super().__init__(clock)
        self.damaged = {}
        self.answers = {}
        self.loads = {}

    async def claim_many(self, user_ids, owner):
        sound = [user_id for user_id in user_ids if user_id not in self.damaged]
        claims = iter(await super().claim_many(sound, owner))
        self.claims[-1] = list(user_ids)
        return [
            self.damaged.get(user_id) or self.answers.get(user_id, lambda claim: claim)(next(claims))
            for user_id in user_ids
        ]

    async def load(self, user_id):
        return self.loads.get(user_id) or await super().load(user_id)


@pytest.mark.parametrize("kind", [StoreError, CorruptRecordError])
async def test_what_a_store_says_is_wrong_with_one_user_is_that_users_alone(clock, kind):
    store = Odd(clock)
    error = StoreError("odd") if kind is StoreError else CorruptRecordError("odd", user_id="ann", body=b"x")
    store.damaged["ann"] = error
    manager = SessionManager(store=store, clock=clock)
    names = ("ann", "bob", "cleo")
    answers = await asyncio.gather(*(manager.open(name, default={}) for name in names), return_exceptions=True)
    assert answers[0] is error
    assert [each.user_id for each in answers[1:]] == ["bob", "cleo"]
    assert store.claims == [list(names)], "and nobody is asked for twice"
    assert manager.statistics().store_up
    del store.damaged["ann"]
    assert (await manager.open("ann", default={})).user_id == "ann"
    await end(clock, manager)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("version", each) for each in (None, "1", 0, -1, 1.0, 2**53 - 1, 10**40)),
        *(("schema", each) for each in (None, "0", -1, 0.0, True)),
        *(("saved_at", each) for each in (None, "today", math.nan, math.inf)),
        *(("body", each) for each in (None, "{}", bytearray(b"{}"))),
    ],
)
async def test_whichever_store_a_record_is_of_it_is_looked_at(clock, field, value):
    store = Odd(clock)
    store.put("ann", b"{}", version=3)
    store.answers["ann"] = lambda claim: claim._replace(record=claim.record._replace(**{field: value}))
    store.loads["ann"] = store.backing.rows["ann"].record._replace(**{field: value})
    manager = SessionManager(store=store, clock=clock)
    with pytest.raises(CorruptRecordError) as caught:
        await manager.open("ann", default={})
    assert caught.value.user_id == "ann"
    if value != 2**53 - 1:  # that is only too much to go on from
        with pytest.raises(CorruptRecordError):
            await manager.read("ann")
    await turns()
    assert store.owner_of("ann") == "", "the claim was granted, and is let go of"
    await end(clock, manager)
    assert store.backing.rows["ann"].record.body == b"{}"


async def test_a_live_user_whose_row_turns_out_damaged_is_saved_when_it_is_mended(clock):
    store = Odd(clock)
    manager = SessionManager(store=store, clock=clock)
    errors = []
    manager.on("error", lambda error, session: errors.append(error))
    ann, bob = [await manager.open(name, default={"gold": 0}) for name in ("ann", "bob")]
    await manager.persist_all_user_data()
    store.backing.highest_lost = store.backing.rows["ann"].epoch
    del store.backing.rows["ann"]
    damage = CorruptRecordError("damaged", user_id="ann", body=b"x")
    store.damaged["ann"] = damage
    for session in (ann, bob):
        session.user_data["gold"] = 1
    await clock.advance("31s")
    assert store.stored("bob") == {"gold": 1}
    assert store.stored("ann") is None
    assert damage in errors
    assert ann.alive
    del store.damaged["ann"]
    await clock.advance("31s")
    assert store.stored("ann") == {"gold": 1}
    await end(clock, manager)


@pytest.mark.guarantee("I6")
async def test_bad_input_changes_nothing(clock, store, manager):
    session = await manager.create()
    calls = [
        (lambda: session.login(True, default={}), InvalidUserIdError),
        (lambda: session.login("", default={}), InvalidUserIdError),
        (lambda: session.login(1, default={}, when_active="join"), OptionError),
        (lambda: session.login(1, default={}, when_active="whatever"), OptionError),
        (lambda: session.login(1, default=(1, 2)), EncodingError),
        (lambda: session.login(1, default=None), EncodingError),
        (lambda: manager.open(1.5), InvalidUserIdError),
        (lambda: manager.open(1, when_active=3), OptionError),
        (lambda: manager.open(1, default={1: 2}), EncodingError),
        (lambda: manager.read(None), InvalidUserIdError),
        (lambda: manager.erase(b"x"), InvalidUserIdError),
        (lambda: manager.edit([]).__aenter__(), InvalidUserIdError),
        (lambda: session.set_user(1, {}), StoreModeError),
    ]
    for call, error in calls:
        with pytest.raises(error):
            await call()
    for default in (lambda: (1,), lambda: None, lambda: asyncio.sleep(0)):
        with pytest.raises((EncodingError, OptionError)):
            await session.login(1, default=default)
        await turns()
        assert store.owner_of(1) == ""
    with pytest.raises(UnknownEventError, match="before_save"):
        manager.on("persist_user_data", print)
    assert session.user_id is None
    assert not store.batches
    gc.collect()
    await end(clock, manager)
    with pytest.raises(SessionEndedError):
        await session.login(1, default={})
    with pytest.raises(ManagerClosedError):
        await manager.open(1, default={})


async def test_without_a_store_the_calls_that_need_one_say_so(clock):
    manager = SessionManager(clock=clock)
    session = await manager.create()
    for call in (
        lambda: session.login(1, default={}),
        lambda: manager.open(1),
        lambda: manager.read(1),
        lambda: manager.erase(1),
        lambda: manager.edit(1).__aenter__(),
    ):
        with pytest.raises(StoreModeError, match="store"):
            await call()
    await manager.destroy()


@pytest.mark.parametrize(
    "options",
    [
        {"store": "players.db"},
        {"store": SessionManager},
        {"encode": dict},
        {"decode": dict},
        {"schema": 1},
        {"max_bytes": 5},
        {"before_save": print},
        {"save_timeout": "5s"},
    ],
    ids=str,
)
def test_settings_of_a_store_need_one(options):
    with pytest.raises(OptionError):
        SessionManager(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"encode": 5},
        {"decode": "x"},
        {"schema": -1},
        {"schema": True},
        {"max_bytes": 0},
        {"before_save": 3},
        {"save_timeout": "0s"},
        {"save_timeout": "soon"},
    ],
    ids=str,
)
def test_wrong_settings_of_a_store_are_refused(clock, options):
    with pytest.raises(OptionError):
        SessionManager(store=ScriptedStore(clock), **options)


async def test_a_login_tries_the_last_save_of_the_earlier_session_at_once(clock, store, manager):
    """The store is back; the login does not wait for a retry that comes after its own patience."""
    session = await changed(manager)
    store.down = True
    with pytest.raises(StoreUnavailableError):
        await let_time_pass(clock, session.destroy())
    await clock.advance("40s")
    while inside(manager).table.state(session) != "ending":  # a retry has just failed
        await clock.advance("10ms")
    store.down = False
    again = await let_time_pass(clock, manager.open(1), "1s")
    assert again.user_data == {"n": 1}
    await end(clock, manager)


async def test_a_login_does_not_fail_for_a_listener_of_the_earlier_session(clock, store, manager):
    """I10: the earlier session is saved and has ended, whatever its listeners raised; that is reported, not raised."""
    heard = []
    manager.on("error", lambda error, session: heard.append(error))
    older = await changed(manager)
    older.on("destroy", lambda: 1 / 0)
    session = await manager.create()
    await let_time_pass(clock, session.login(1))
    assert session.user_data == {"n": 1}
    await turns()
    assert len(heard) == 1
    await end(clock, manager)
