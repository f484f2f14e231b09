"""Faults of this line of work, one at a time. What lives here: what each changes in the sources. What must not: tests.

Each is a text of the sources, which is there exactly once, and what a tired programmer might have written in its place.
`tests` are tried if the simulation does not find it: it sees no wrong error text, no slow call, no table of its own.
They are one list, each like the last, and so one module: in two, somebody would look for a fault in the wrong one.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FAULTS", "Fault"]

CORE = ("tests/core",)
USERS = (
    "tests/sessions/test_login.py",
    "tests/sessions/test_open.py",
    "tests/sessions/test_users.py",
    "tests/sessions/test_edits.py",
    "tests/sessions/test_cancellation.py",
    "tests/ownership",
    "tests/events/test_deadlocks.py",
    "tests/saving",
)
SAVING = (
    "tests/saving",
    "tests/ownership",
    "tests/sessions/test_create.py",
    "tests/sessions/test_last_save.py",
    "tests/sessions/test_draining.py",
    "tests/sessions/test_cancellation.py",
    "tests/events/test_deadlocks.py",
)
BATCHES = ("tests/core/test_batch.py", *SAVING)
ENDING = (
    "tests/sessions/test_create.py",
    "tests/sessions/test_ending.py",
    "tests/sessions/test_last_save.py",
    "tests/sessions/test_draining.py",
    "tests/saving/test_to_listeners.py",
    "tests/saving/test_schedule.py",
    "tests/saving/test_waiting.py",
    "tests/saving/test_retries.py",
    "tests/events/test_deadlocks.py",
    "tests/events/test_log.py",
    "tests/random/test_manager_machine.py",
)
SPILL = (
    "tests/sessions/test_spilling.py",
    "tests/sessions/test_spilling_conflicts.py",
    "tests/sessions/test_spilling_functions.py",
    "tests/files/test_spill_files.py",
    "tests/sessions/test_spilling_exits.py",
)


class Fault(NamedTuple):
    """One change for the worse."""

    name: str
    file: str
    """Within src/cagey_sessions."""
    before: str
    after: str
    tests: tuple[str, ...] = ()

    @property
    def is_in_core(self) -> bool:
        """Whether it has to be compiled."""
        return not self.file.endswith(".py")


FAULTS = [
    # saves
    Fault(
        "acknowledge before the write",
        "saving/writing.py",
        "            verdicts = await call.answer()\n",
        "            from .stores import Outcome\n            verdicts = [Verdict(Outcome.SAVED)] * len(records)\n",
        SAVING,
    ),
    Fault(
        "fenced counts as saved",
        "saving/verdicts.py",
        "if outcome is Outcome.SAVED or outcome is Outcome.ALREADY:",
        "if outcome in (Outcome.SAVED, Outcome.ALREADY, Outcome.FENCED):",
        SAVING,
    ),
    Fault(
        "a row that could not be written counts as saved",
        "saving/verdicts.py",
        "if outcome is Outcome.SAVED or outcome is Outcome.ALREADY:",
        "if outcome in (Outcome.SAVED, Outcome.ALREADY, Outcome.FAILED):",
        SAVING,
    ),
    Fault(
        "a repeat counts as a failure",
        "saving/verdicts.py",
        "if outcome is Outcome.SAVED or outcome is Outcome.ALREADY:",
        "if outcome is Outcome.SAVED:",
        SAVING,
    ),
    Fault(
        "a lost row is not claimed again",
        "saving/verdicts.py",
        "        elif outcome is Outcome.MISSING:\n            row.move(Stage.UNOWNED)\n",
        "        elif outcome is Outcome.MISSING:\n            self.acknowledge(row, record.saved_at)\n",
        SAVING,
    ),
    Fault(
        "an erased user is written again",
        "stores/memory.py",
        "        if row.erased:\n            return Outcome.ERASED\n",
        "",
        ("tests/stores/test_memory.py",),
    ),
    Fault(
        "claimed again over what somebody else has saved",
        "saving/reclaiming.py",
        "elif self._is_lost(row) or not self._is_ours(row, claim):",
        "elif self._is_lost(row):",
        SAVING,
    ),
    Fault(
        "who was taken over after a rollback is written over",
        "saving/reclaiming.py",
        "if row.was_fenced and claim.epoch <= self._table.epoch(row.session):",
        "if row.was_fenced:",
        ("tests/ownership/test_rollbacks.py", *SAVING),
    ),
    Fault(
        "a claim that the engine has lost ends the session",
        "saving/reclaiming.py",
        "return stored is None or stored.version <= acknowledged",
        "return False",
        ("tests/ownership/test_rollbacks.py",),
    ),
    Fault(
        "a new life of the engine is not noticed",
        "stores/link.py",
        "if self.store.incarnation != self._incarnation:",
        "if False:",
        ("tests/ownership/test_rollbacks.py",),
    ),
    Fault(
        "a save that may have been written is forgotten",
        "saving/to_store.py",
        "self._results.unknown.setdefault(session, set()).add((row.version, fingerprint))",
        "pass",
        (
            *SAVING,
            "tests/ownership/test_claims.py",
            "tests/ownership/test_releases.py",
            "tests/ownership/test_takeovers.py",
            "tests/saving/test_hanging_calls.py",
            "tests/saving/test_outages.py",
            "tests/saving/test_retries.py",
            "tests/saving/test_waiting.py",
            "tests/sessions/test_cancellation.py",
            "tests/sessions/test_last_save.py",
            "tests/ownership/test_claims.py",
            "tests/ownership/test_releases.py",
            "tests/sessions/test_login.py",
            "tests/sessions/test_open.py",
            "tests/saving/test_unfenced.py",
            "tests/events/test_deadlocks.py",
            "tests/ownership/test_claims.py",
            "tests/ownership/test_takeovers.py",
            "tests/sessions/test_draining.py",
            "tests/sessions/test_edits.py",
            "tests/sessions/test_last_save.py",
            "tests/sessions/test_login.py",
            "tests/sessions/test_open.py",
            "tests/sessions/test_edits.py",
            "tests/sessions/test_users.py",
        ),
    ),
    Fault(
        "the old epoch after a new claim",
        "saving/reclaiming.py",
        "                self._table.own(row.session, claim.epoch)\n"
        "                row.record = row.record._replace(epoch=claim.epoch)\n",
        "",
        SAVING,
    ),
    Fault(
        "the release is not part of the last save",
        "saving/to_store.py",
        "        release = is_ending and self._link.store.shared and self._table.is_final(session)\n",
        "        release = False\n",
        USERS,
    ),
    Fault(
        "every save releases",
        "saving/to_store.py",
        "        release = is_ending and self._link.store.shared and self._table.is_final(session)\n",
        "        release = True\n",
        USERS,
    ),
    Fault(
        "live data goes to the store",
        "saving/writing.py",
        "        call = self._link.write(records)\n",
        "        import asyncio as later; await later.sleep(0)\n"
        "        import orjson; live = self._results._table.active_session\n"
        "        records = [record._replace(body=orjson.dumps(live(record.user_id).user_data))\n"
        "                   for record in records]\n        call = self._link.write(records)\n",
        SAVING,
    ),
    Fault(
        "everybody at once after an outage",
        "saving/to_store.py",
        "return not self._pacing.is_active or self._pacing.allows()",
        "return True",
        SAVING,
    ),
    Fault(
        "one poison row sinks its batch for ever",
        "saving/writing.py",
        "elif len(part) > 1 and not isinstance(error, StoreUnavailableError):",
        "elif len(part) > 999 and not isinstance(error, StoreUnavailableError):",
        SAVING,
    ),
    # batches in the core
    Fault(
        "a batch counts as saved whatever the verdicts",
        "core/batch.pxi",
        "            if type(verdict) is not self.plan.verdict or not verdict or not self.is_saved(verdict):\n"
        "                return None\n",
        "            pass\n",
        BATCHES,
    ),
    Fault(
        "a batch takes whose save has failed",
        "core/batch.pxi",
        "            if slot == PERIODIC or table.rows[slot].failures != 0:\n",
        "            if slot == PERIODIC:\n",
        BATCHES,
    ),
    Fault(
        "a batch drops the wish of who asked meanwhile",
        "core/batch.pxi",
        "            elif table.rows[slot].state != SAVING or (watched and session in watched):\n",
        "            elif table.rows[slot].state != SAVING:\n",
        BATCHES,
    ),
    Fault(
        "what is acknowledged is not known as stored",
        "core/lanes.pxi",
        "            self.copies[slot].stored = self.copies[slot].digest\n",
        "            pass\n",
        BATCHES,
    ),
    Fault(
        "a batch passes over whoever cannot be encoded",
        "core/batch.pxi",
        "            except Exception:\n                self.set_aside()\n                continue\n",
        "            except Exception:\n                self.taking = None\n                continue\n",
        BATCHES,
    ),
    # versions and states
    Fault(
        "a retry gets a new version",
        "core/lanes.pxi",
        "        cdef bint is_new = row.version == 0 or self.copies[slot].digest != digest\n        if is_new and",
        "        cdef bint is_new = row.version == 0 or self.copies[slot].digest != digest or row.version != row.acknowledged\n"
        "        if is_new and",
        CORE,
    ),
    Fault(
        "the digest of a failed save counts as stored",
        "core/lanes.pxi",
        "        elif row.version == row.acknowledged:\n            return 0\n        return row.version",
        "        else:\n            return 0\n        return row.version",
        CORE,
    ),
    Fault(
        "the acknowledged version moves on failure",
        "core/lanes.pxi",
        "        if row.failures < 255:\n            row.failures += 1\n",
        "        row.acknowledged = version\n        if row.failures < 255:\n            row.failures += 1\n",
        CORE,
    ),
    Fault(
        "a flag for a counter: who asks during a save is forgotten",
        "core/saves.pxi",
        '("saving", "ask", "saving_asked"),',
        '("saving", "ask", "saving"),',
        (*CORE, *ENDING),
    ),
    Fault(
        "a wish is dropped when its session ends",
        "core/saves.pxi",
        '("asked", "end", "ending_asked"),',
        '("asked", "end", "ending"),',
        (*CORE, *ENDING),
    ),
    # the table and the wheel
    Fault(
        "a cascade loses a row",
        "core/wheel.pxi",
        "            wheel_arm(wheel, rows, slot, rows[slot].deadline)\n            if emptied == bucket:\n",
        "            if emptied != bucket:\n"
        "                wheel_arm(wheel, rows, slot, rows[slot].deadline)\n            if emptied == bucket:\n",
        CORE,
    ),
    Fault(
        "> for >=: a row that is due now waits",
        "core/wheel.pxi",
        "            if rows[slot].deadline <= wheel.elapsed:",
        "            if rows[slot].deadline < wheel.elapsed:",
        CORE,
    ),
    Fault(
        "a cascade has no limit",
        "core/wheel.pxi",
        "            prefetch(&rows[rows[slot].ahead])\n            budget[0] -= 1\n",
        "            prefetch(&rows[rows[slot].ahead])\n            budget[0] -= bucket < BUCKETS_PER_LEVEL\n",
        CORE,
    ),
    Fault(
        "the place of a session makes its first interval longer",
        "core/table.pxi",
        "wheel_arm(&self.wheel, self.rows, slot, now + self.ticks_to_place(slot, now, interval))",
        "wheel_arm(&self.wheel, self.rows, slot, now + interval + self.ticks_to_place(slot, now, interval))",
        CORE,
    ),
    Fault(
        "whoever is saved early stays together with all who were saved then",
        "core/rows.pxi",
        "        if tick >= self.rows[slot].deadline:",
        "        if True:",
        CORE,
    ),
    Fault(
        "one lane starves the others",
        "core/lanes.pxi",
        "        self.served_last = lane\n",
        "",
        CORE,
    ),
    Fault(
        "a taken key is overwritten",
        "core/table.pxi",
        "            if self.key_slot_hashed(<PyObject*> key, hash):\n",
        "            if self.key_slot_hashed(<PyObject*> key, hash) > 0xFFFFFFF0u:\n",
        (*CORE, *ENDING),
    ),
    Fault(
        "a session that is ending is found by its key",
        "core/table.pxi",
        "        self.enter_lane(slot, END)\n        self.forget_key(session)\n",
        "        self.enter_lane(slot, END)\n",
        ("tests/core/test_index.py",),
    ),
    Fault(
        "the user of an ended session stays taken",
        "core/table.pxi",
        "            index_remove(&self.by_user, self.hash_of_user(session.user_id), slot)\n",
        "",
        CORE,
    ),
    Fault(
        "a mark is a flag: one that is set during a save is forgotten",
        "core/lanes.pxi",
        "        row.marks &= MARKED\n",
        "        row.marks = 0\n",
        (
            "tests/saving/test_marks.py",
            "tests/core/test_marks.py",
        ),
    ),
    Fault(
        "a save that has failed forgets the mark",
        "core/lanes.pxi",
        "        row.marks = MARKED\n        if row.failures < 255:\n",
        "        row.marks &= MARKED\n        if row.failures < 255:\n",
        (
            "tests/saving/test_marks.py",
            "tests/core/test_marks.py",
        ),
    ),
    # ends
    Fault(
        "destroy does not wait for the save under way",
        "sessions/ending.py",
        "        outcome = await self._autosave.wait_settled(session, until)\n        if",
        "        outcome = None\n        if",
        ENDING,
    ),
    Fault(
        "a failed last save ends the session all the same",
        "sessions/ending.py",
        "                if not self._is_hopeless(error):\n",
        "                if error is None:\n",
        ENDING,
    ),
    Fault(
        "what a last listener changes is not saved",
        "sessions/ending.py",
        "if not self._saver.has_to_release(session) and self._saver.is_saved(session):",
        "if ending.last_error is None and not self._saver.has_to_release(session):",
        ENDING,
    ),
    Fault(
        "cancel-through: who stops waiting stops the end",
        "sessions/ending.py",
        "                return await asyncio.shield(ending.attempt)\n",
        "                return await ending.attempt\n",
        ENDING,
    ),
    Fault(
        "a manager that is being destroyed admits users",
        "sessions/beginning.py",
        "        if self._endings.drain is not None:\n            raise ManagerClosedError(",
        "        if self._server.closed:\n            raise ManagerClosedError(",
        ENDING,
    ),
    Fault(
        "a failed release is not tried again",
        "ownership/releases.py",
        "        if release.attempts == MOST_ATTEMPTS:\n",
        "        if error:\n",
        ("tests/ownership/test_releases.py",),
    ),
    Fault(
        "unfenced release",
        "stores/memory.py",
        "        if row is None or row.epoch != epoch or row.owner != owner or row.as_stored().fence_fault():\n"
        "            return False\n        row.rel",
        "        if row is None:\n            return False\n        row.rel",
        ("tests/stores/test_memory.py",),
    ),
    Fault(
        "a released row takes anybody's repeat",
        "stores/memory.py",
        "or record.owner != row.claimant:",
        "or (row.owner and row.owner != record.owner):",
        ("tests/stores/test_memory.py",),
    ),
    Fault(
        "a release that was refused is believed",
        "ownership/releases.py",
        "                    if is_released or not self._link.store.shared:\n",
        "                    if True:\n",
        ("tests/simulation/test_found.py",),
    ),
    Fault(
        "of several claims of a user an older one is let go of",
        "ownership/releases.py",
        "key=lambda each: each.epoch)",
        "key=lambda each: -each.epoch)",
        ("tests/ownership/test_releases.py",),
    ),
    Fault(
        "the rate after an outage has no end",
        "saving/to_store.py",
        "if pacing.is_active and not self._table.has_due():",
        "if pacing.is_active and pacing._tokens >= 1:",
        ("tests/simulation/test_found.py",),
    ),
    # users
    Fault(
        "a default is shared between users",
        "sessions/loading.py",
        "data = _made(default) if callable(default) else self._server.encoding.copy(default)",
        "data = _made(default) if callable(default) else default",
        USERS,
    ),
    Fault(
        "a claim that nobody waits for is kept",
        "ownership/claims.py",
        "            elif claim.granted:\n                self.disown(claim)",
        "            elif claim.granted:\n                pass",
        USERS,
    ),
    Fault(
        "a load that fails keeps the claim",
        "sessions/loading.py",
        "        except BaseException:\n            claims.release_later(user_id, claim.epoch)\n            raise\n\n    def own(",
        "        except BaseException:\n            raise\n\n    def own(",
        USERS,
    ),
    Fault(
        "two at work on one user",
        "ownership/turns.py",
        "        if not turn.is_taken:\n            turn.is_taken = True\n",
        "        if True:\n            turn.is_taken = True\n",
        USERS,
    ),
    Fault(
        "processes that fork after their manager was made are one owner",
        "process.py",
        '        self.owner = f"{socket.gethostname()}-{self.pid}-{os.urandom(8).hex()}"\n',
        "        self.owner = socket.gethostname()\n",
        ("tests/sessions/test_forks.py",),
    ),
    Fault(
        "a cancellation out of a hook stops the save of everybody",
        "saving/to_store.py",
        "        except BaseException as error:\n            raise _unsavable",
        "        except Exception as error:\n            raise _unsavable",
        ("tests/events/test_user_code.py",),
    ),
    Fault(
        "a load that fails for one user is a store that is down",
        "stores/link.py",
        "        if not self.store.independent or self.down:\n",
        "        if True:\n",
        ("tests/events/test_user_code.py",),
    ),
    Fault(
        "a turn with a user is waited for without looking who waits for whom",
        "ownership/turns.py",
        "        if would_deadlock(target):\n",
        "        if False:\n",
        ("tests/events/test_deadlocks.py", "tests/ownership/test_turns.py"),
    ),
    Fault(
        "an edit of a live session takes no turn",
        "sessions/users.py",
        "                frame.confine()\n                async with self._edit_live(live) as data:\n",
        "                self._loading.claims.turns._turns[user_id].give()\n                async with self._edit_live(live) as data:\n",
        ("tests/events/test_deadlocks.py", "tests/ownership/test_turns.py"),
    ),
    Fault(
        "a login does not wait for the older session's last save",
        "sessions/loading.py",
        "                if not await self.within(replaced, 2 * server.options.save_timeout + SECOND):\n",
        '                endings.begin_end(older, True, "replaced")\n'
        "                server.table.forget(older)\n                if False:\n",
        USERS,
    ),
    Fault(
        "a session is ended with the open that made it, whoever has been given it",
        "sessions/login.py",
        "        if live is not None:\n            self._untaken.discard(live)\n",
        "",
        (*USERS, "tests/sessions/test_draining.py", "tests/sessions/test_last_save.py"),
    ),
    Fault(
        "an edit that may be written says that it is not",
        "saving/verdicts.py",
        "                if self.failures(row)\n",
        "                if False\n",
        USERS,
    ),
    Fault(
        "an edit is written although its block has raised",
        "sessions/ending.py",
        "        self.begin_end(session, persist=False, reason=EndReason.DESTROYED)\n\n    async def write(",
        "        self.begin_end(session, persist=True, reason=EndReason.DESTROYED)\n\n    async def write(",
        USERS,
    ),
    Fault(
        "an edit that was told to have failed is written later",
        "sessions/ending.py",
        "            ending.persist = False\n            self.resume(session, ending)\n",
        "            self.resume(session, ending)\n",
        USERS,
    ),
    Fault(
        "a release whose task is cancelled is forgotten",
        "ownership/releases.py",
        "        finally:\n            if left:\n",
        "        finally:\n            if left and not asyncio.current_task().cancelling():\n",
        USERS,
    ),
    Fault(
        "could not read counts as new",
        "ownership/claims.py",
        "            if isinstance(error, StoreError):\n                return error\n            unavailable",
        "            if isinstance(error, StoreError):\n"
        "                for user_id, future in wanted.items():\n"
        "                    future.done() or future.set_result(Claim(user_id, 1, None))\n"
        "                return None\n            unavailable",
        USERS,
    ),
    Fault(
        "erasing leaves the session live",
        "sessions/users.py",
        "            await self._end_erased(user_id)\n            if server.spill",
        "            if server.spill",
        USERS,
    ),
    Fault(
        "a claim that had no answer is forgotten",
        "ownership/claims.py",
        "        if self._link.store.shared:\n            self._check_later(user_ids)\n",
        "",
        USERS,
    ),
    # the store
    Fault(
        "a call that hangs is never given up",
        "stores/link.py",
        "            self.store.abort(call.task)\n",
        "            pass\n",
        SAVING,
    ),
    Fault(
        "a call nobody waits for has no deadline",
        "stores/link.py",
        "            self._link.bound(self, self._left())\n            raise\n",
        "            raise\n",
        SAVING,
    ),
    Fault(
        "everybody knocks on a store that is down",
        "stores/link.py",
        "return not self.down or (self._probe is None and self.now() >= self._probe_at)",
        "return True",
        SAVING,
    ),
    Fault(
        "nobody looks whether the store is back",
        "stores/link.py",
        "        self._probe_timer = self._clock.call_later(self._probe_at - now, self._let_probe, Context())\n",
        "",
        SAVING,
    ),
    Fault(
        "backlog dropped: nobody begins again when the store is back",
        "stores/link.py",
        "            admission.set_result(None)\n        self._on_change()\n",
        "            admission.set_result(None)\n",
        SAVING,
    ),
    Fault(
        "work goes on at a store that has gone down meanwhile",
        "saving/writing.py",
        'return "" if self._link.may_call() else "is down"',
        'return ""',
        ("tests/simulation/test_found.py",),
    ),
    # files and signals
    Fault(
        "a damaged line is taken as it is",
        "files/format.py",
        '    if raw[:9] != b"%08x " % crc32(content):',
        "    if False:",
        ("tests/sessions/test_snapshot.py",),
    ),
    Fault(
        "a file takes its place before it is on the disk",
        "files/format.py",
        "            self._files.sync(self._file)\n",
        "",
        ("tests/sessions/test_snapshot.py",),
    ),
    Fault(
        "a spill is replayed over what somebody has saved since",
        "files/spill.py",
        "            elif entry.follows(claim, stored, store):",
        "            elif True:",
        SPILL,
    ),
    Fault(
        "a spill forgets the saves that nobody answered",
        "saving/to_store.py",
        "        known = set(self._results.unknown.get(session, ()))\n",
        "        known: set[tuple[int, int]] = set()\n",
        SPILL,
    ),
    Fault(
        "what is spilled takes the place of what waits in the file",
        "files/spill.py",
        "for entry in (*there, *collected) if entry not in settled",
        "for entry in collected if entry not in settled",
        SPILL,
    ),
    Fault(
        "who is erased before the spill is written stays in it",
        "files/spill.py",
        "        ours = [*self._collected, *self._written]",
        "        ours = [*self._written]",
        (*SPILL, "tests/sessions/test_spilling_erased.py"),
    ),
    Fault(
        "who is erased after the spill is written stays in it",
        "files/spill.py",
        "        ours = [*self._collected, *self._written]",
        "        ours = [*self._collected]",
        (*SPILL, "tests/sessions/test_spilling_erased.py"),
    ),
    Fault(
        "two processes write one spill at the same time",
        "files/spill.py",
        "                    lock.acquire(self._lock_path)\n",
        "                    pass\n",
        (*SPILL, "tests/sessions/test_spilling_erased.py"),
    ),
    Fault(
        "a thread is left at work by the second cancellation",
        "threads.py",
        "            if cancelled is None:\n                cancelled = error\n",
        "            if cancelled is not None:\n                raise\n            if cancelled is None:\n"
        "                cancelled = error\n",
        ("tests/sessions/test_snapshot.py",),
    ),
    Fault(
        "a snapshot takes its place though it was cancelled before",
        "sessions/snapshot.py",
        "        await in_thread(new.finish)  # synced to the disk, but not in place: if this is cancelled the old file stays\n"
        "        await in_thread(new.commit)\n",
        "        await in_thread(lambda: (new.finish(), new.commit()))\n",
        ("tests/sessions/test_snapshot.py",),
    ),
    Fault(
        "a file is closed while a thread writes to it",
        "files/format.py",
        "        if self._step.acquire(blocking=False):\n            try:\n                self._remove()\n"
        "            finally:\n                self._step.release()\n",
        "        self._remove()\n",
        ("tests/sessions/test_snapshot.py",),
    ),
    Fault(
        "a lock file is opened through a link",
        "paths.py",
        "(0 if follow else _NO_FOLLOW)",
        "0",
        ("tests/stores/test_sqlite_holding.py",),
    ),
    Fault(
        "whatever has its name is a lock file",
        "stores/file_lock.py",
        "            _read_pid(file, path)  # or it is none of ours\n",
        "",
        ("tests/stores/test_sqlite_holding.py",),
    ),
    Fault(
        "the log of SQLite stays as large as a long read has made it",
        "stores/sqlite/store.py",
        '                connection.execute(f"PRAGMA journal_size_limit = {LARGEST_LOG}")  # see `_empty_large_log`\n',
        "",
        ("tests/stores/test_sqlite_files.py",),
    ),
    Fault(
        "the log of SQLite stays large while nobody saves",
        "stores/sqlite/store.py",
        '            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()',
        '            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()',
        ("tests/stores/test_sqlite_files.py",),
    ),
    Fault(
        "one spilled user who is not taken now stops the replay",
        "sessions/spilling.py",
        "        return not self._link.down\n",
        "        return not any(plan.error for plan in plans)\n",
        (*SPILL, "tests/sessions/test_spilling_erased.py"),
    ),
    Fault(
        "the exit status pretends that all is saved",
        "sessions/signals.py",
        "                name_some(unsaved),\n            )\n            return 1\n",
        "                name_some(unsaved),\n            )\n            return 0\n",
        ("tests/sessions/test_signals.py",),
    ),
    Fault(
        "the program's own signal handler is not called",
        "sessions/signals.py",
        "        if _is_hosts_own(self.found):\n            self.found(number, frame)\n",
        "",
        ("tests/sessions/test_signals.py",),
    ),
    # workers
    Fault(
        "latch not released: a worker that ends is still counted",
        "saving/workers.py",
        "        self.free += not worker.finished\n",
        "",
        SAVING,
    ),
    Fault(
        "the next deadline is counted from the end of the save",
        "saving/autosave.py",
        "        taken_at = save.started // self.tick\n",
        "        taken_at = self.now_tick()\n",
        (*SAVING, *ENDING),
    ),
]
