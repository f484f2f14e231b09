# What every session object is made of.
#
# What lives here: `SessionCore`, and what may be a key or a user id. What must not: rows, lists, deadlines - a session
# knows its slot, and asks the table.
#
# Invariants
#   - `slot` is 0 once the session is forgotten; until `end_reason` is set, data and bag can still be read.
#   - A session has no eager dict: the bag is made at the first `set`, the listeners at the first `on`.
#
# Cost: everything here is O(1).

cdef enum:
    MAX_USER_ID_BYTES = 1024


def check_key(key):
    """Raise `InvalidKeyError` unless the key is a non-empty `str` (a subclass has its own ideas of equality)."""
    if type(key) is not str:
        raise InvalidKeyError(f"a key is a non-empty str, not {type(key).__name__}")
    if not key:
        raise InvalidKeyError("a key is a non-empty str, and this one is empty; leave it out for a session without a key")


def check_user_id(user_id, required=None):
    """Raise `InvalidUserIdError` unless the id is an `int` of 64 bits or a `str` of 1 to 1,024 bytes of UTF-8.

    `required` narrows it to ``int`` or ``str``. O(length).
    """
    kind = type(user_id)
    if kind is not int and kind is not str:
        raise InvalidUserIdError(f"a user id is an int or a str, not {kind.__name__}")
    if required is not None and kind is not required:
        raise InvalidUserIdError(f"this manager takes user ids of type {required.__name__}, not {kind.__name__}")
    if kind is int:
        if not -0x8000000000000000 <= user_id <= 0x7FFFFFFFFFFFFFFF:
            raise InvalidUserIdError("a user id that is an int has to fit into 64 signed bits")
        return
    if not user_id:
        raise InvalidUserIdError("a user id that is a str must not be empty")
    try:
        size = len(user_id.encode())
    except UnicodeEncodeError:
        raise InvalidUserIdError(f"a user id must be valid text; this one holds a lone surrogate: {user_id!r:.80}") from None
    if size > MAX_USER_ID_BYTES:
        raise InvalidUserIdError(f"a user id that is a str takes at most {MAX_USER_ID_BYTES} bytes of UTF-8; this one takes {size}")
    if "\0" in user_id:
        raise InvalidUserIdError(f"a user id must not hold a NUL character: {user_id!r:.80}")


cdef class SessionTable


cdef class SessionCore:
    """What every session is made of: its place in the table, its identity, its data and its bag.

    Made by `SessionTable.create`, never by hand.
    """
    cdef SessionTable table
    cdef uint32_t slot              # 0 once forgotten
    cdef uint32_t generation
    cdef readonly object key
    cdef readonly object user_id
    cdef object data
    cdef object bag
    cdef public object _listeners
    cdef readonly object end_reason
    cdef object __weakref__

    def __init__(self):
        raise UsageError("sessions are made by `await manager.create()`")

    def __reduce__(self):
        raise TypeError("a session is one human on this server: it cannot be copied or pickled; copy its user_data")

    def __repr__(self):
        if self.table is None:
            return f"<{type(self).__name__} of no manager>"
        who = "anonymous" if self.user_id is None else f"user {self.user_id!r:.80}"
        if self.end_reason is not None:
            life = f"ended: {self.end_reason}"
        else:
            life = "live" if self.slot and not is_ending(self.table.rows[self.slot].state) else "ending"
        return f"<{type(self).__name__} {who}, {life}>"

    @property
    def alive(self):
        """Whether the session has not ended. True until the last ``destroy`` listener has run."""
        return self.table is not None and self.end_reason is None

    @property
    def user_data(self):
        """The user's data: the very object given to `set_user`, or None while nobody is identified.

        Change it in place, or assign another object. Raises `SessionEndedError` after the end.
        """
        table_of(self)
        return self.data

    @user_data.setter
    def user_data(self, value):
        table_of(self)
        if self.user_id is None:
            raise NotIdentifiedError("this session has no user yet; `await session.login(user_id)` comes first, or without a store `set_user`")
        if value is None:
            raise InvalidUserDataError("user_data must not be None: there would be nothing to save")
        self.data = value
        if self.slot:
            self.table.rows[self.slot].marks |= MARKED

    def mark_changed(self):
        """Say that `user_data` has changed. Needed with ``tracking="marked"``, and harmless without.

        The mark stays until a save is acknowledged whose bytes were fixed after it. Raises `NotIdentifiedError`,
        and `SessionEndedError` once the last save is done. O(1).
        """
        cdef SessionTable table = table_of(self)
        if self.user_id is None:
            raise NotIdentifiedError("this session has no user yet, and nothing that could have changed")
        table.rows[table.slot_of(self)].marks |= MARKED

    def set(self, key, value):
        """Keep any live object under a name for as long as the session lives. It is never saved.

        Raises `SessionEndedError` after the end. O(1).
        """
        table_of(self)
        if type(key) is not str:
            raise InvalidKeyError(f"a name in the bag is a str, not {type(key).__name__}")
        if self.bag is None:
            self.bag = {}
        (<dict> self.bag)[key] = value

    def get(self, key, default=None):
        """The object kept under a name, or `default`. Works after the end too, on what is left. O(1)."""
        if self.bag is None:
            return default
        return (<dict> self.bag).get(key, default)

    @property
    def _host(self):
        """Whoever the table belongs to."""
        if self.table is None:
            raise_handmade()
        return self.table.host

    def _require_alive(self):
        """Raise `SessionEndedError` after the end, and what any use from the wrong place raises."""
        table_of(self)

    def _end(self, reason):
        """Let go of the data and the listeners; from here on the handle is dead."""
        self.end_reason = reason
        self.data = None
        self._listeners = None


cdef int raise_handmade() except -1:
    raise UsageError("this session belongs to no manager; sessions are made by `await manager.create()`")


cdef int raise_ended(SessionCore session) except -1:
    who = "" if session.user_id is None else f" of user {session.user_id!r:.80}"
    raise SessionEndedError(f"the session{who} has ended ({session.end_reason})")


cdef inline SessionTable table_of(SessionCore session):
    """The table of a session that has not ended, used from the right thread; raises otherwise."""
    if session.table is None:
        raise_handmade()
    if session.end_reason is not None:
        raise_ended(session)
    session.table.check_thread()
    return session.table
