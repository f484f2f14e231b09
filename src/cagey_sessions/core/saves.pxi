# The life of a save, as one table of states and events.
#
# What lives here: the states, the events that move between them, and the step function. What must not: lists, clocks,
# listeners - a step only changes the state. The table is exported as `SAVE_TRANSITIONS`, so that the engine, the tests
# and the documentation use the same one.
#
# Invariants
#   - At most one save of a session is in flight: `take` leads only from a state without one to a state with one.
#   - A caller that asks while a save is in flight gets a later save: the `*_ASKED` states survive acknowledgement and
#     failure.
#   - When a session is ended, a save that the timer wants (DUE) is dropped; one that a caller wants (ASKED) is not.
#   - A mark stays until a save is acknowledged whose bytes were encoded after it. As only one save is in flight at a
#     time, two bits suffice where a counter would be needed otherwise.
#
# Cost: one array look-up a step.

cdef enum:
    MARKED = 1              # marked after the bytes in flight were encoded, or while none are in flight
    MARKED_BEFORE = 2       # marked before: the save in flight has the change

cdef enum:
    FLAG_LOST = 1                # the session has lost its user: no save of it may be written any more
    FLAG_FINAL = 2               # the next save of an ending session is its last one, and releases the user
    FLAG_RELEASED = 4            # the save last acknowledged has released the user
    FLAG_SILENT = 8              # the session emits nothing and cannot be found: it only holds a user for a moment

cdef enum:
    NONE                    # no user, nothing to save
    IDLE                    # saved or not yet due; in the wheel if there is an interval
    DUE                     # the timer wants a save; in the periodic lane
    ASKED                   # a caller wants a save; in the urgent lane
    SAVING                  # in flight
    SAVING_ASKED            # in flight, and a caller has asked since its bytes were encoded
    ENDING                  # being ended; in the wheel while a failed last save waits for its retry
    ENDING_ASKED            # being ended, a save is wanted; in the final lane
    ENDING_SAVING           # being ended, a save is in flight
    ENDING_SAVING_ASKED     # being ended, in flight, and asked again
    GONE                    # forgotten, or never was
    STATES

cdef enum:
    IDENTIFY
    BECOME_DUE
    ASK
    TAKE
    ACKNOWLEDGE
    FAIL
    END
    FORGET
    EVENTS

SAVE_STATES = ("none", "idle", "due", "asked", "saving", "saving_asked", "ending", "ending_asked", "ending_saving",
               "ending_saving_asked", "gone")

SAVE_EVENTS = ("identify", "become_due", "ask", "take", "acknowledge", "fail", "end", "forget")

SAVE_TRANSITIONS = (
    ("none", "identify", "idle"),
    ("none", "end", "ending"),

    ("idle", "become_due", "due"),
    ("idle", "ask", "asked"),
    ("idle", "end", "ending"),

    ("due", "ask", "asked"),
    ("due", "take", "saving"),
    ("due", "end", "ending"),

    ("asked", "ask", "asked"),
    ("asked", "take", "saving"),
    ("asked", "end", "ending_asked"),

    ("saving", "ask", "saving_asked"),
    ("saving", "acknowledge", "idle"),
    ("saving", "fail", "idle"),
    ("saving", "end", "ending_saving"),

    ("saving_asked", "ask", "saving_asked"),
    ("saving_asked", "acknowledge", "asked"),
    ("saving_asked", "fail", "asked"),
    ("saving_asked", "end", "ending_saving_asked"),

    ("ending", "become_due", "ending_asked"),
    ("ending", "ask", "ending_asked"),
    ("ending", "forget", "gone"),

    ("ending_asked", "ask", "ending_asked"),
    ("ending_asked", "take", "ending_saving"),
    ("ending_asked", "forget", "gone"),

    ("ending_saving", "ask", "ending_saving_asked"),
    ("ending_saving", "acknowledge", "ending"),
    ("ending_saving", "fail", "ending"),
    ("ending_saving", "forget", "gone"),

    ("ending_saving_asked", "ask", "ending_saving_asked"),
    ("ending_saving_asked", "acknowledge", "ending_asked"),
    ("ending_saving_asked", "fail", "ending_asked"),
    ("ending_saving_asked", "forget", "gone"),
)

cdef uint8_t transitions[STATES][EVENTS]

cdef void load_transitions():
    memset(transitions, STATES, sizeof(transitions))
    for before, event, after in SAVE_TRANSITIONS:
        transitions[<int> SAVE_STATES.index(before)][<int> SAVE_EVENTS.index(event)] = SAVE_STATES.index(after)

load_transitions()


cdef inline bint has_save_in_flight(uint8_t state) noexcept nogil:
    return state == SAVING or state == SAVING_ASKED or state == ENDING_SAVING or state == ENDING_SAVING_ASKED


cdef inline bint is_ending(uint8_t state) noexcept nogil:
    return ENDING <= state <= ENDING_SAVING_ASKED


cdef inline int step(Row* row, int event) except -1:
    """Move a row by one event, and return the new state. Raises `UsageError` if the table has no such move."""
    cdef uint8_t after = transitions[row.state][event]
    if after == STATES:
        raise UsageError(f"a save that is {SAVE_STATES[row.state]!r} cannot {SAVE_EVENTS[event]!r}")
    row.state = after
    return after
