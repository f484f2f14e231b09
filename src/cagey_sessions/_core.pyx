# cython: language_level=3, binding=False, embedsignature=True, embedsignature.format=clinic, freethreading_compatible=False
"""The compiled core: session table, key and user index, timing wheel, save states.

What lives here: one row of C memory for each session, the lists those rows are threaded on, and the rules by which
they move. What must not: asyncio, I/O, a clock. The core gets the time as ``now`` in whole ticks and answers with what
is due, so that it can be run against a model, step by step.

The files, in the order in which they are included:

``core/values.pxi``    which values are plain data, and their bytes
``core/bodies.pxi``    from bytes back to a value, without loss
``core/digest.pxi``    a keyed hash of a body
``core/wheel.pxi``     a hierarchical timing wheel over slot numbers
``core/saves.pxi``     the states of a save, as one table
``core/index.pxi``     slots by hash
``core/session.pxi``   what every session object is made of
``core/rows.pxi``      the rows themselves: where they lie, who has one
``core/lanes.pxi``     the queues of saves: asked for or due, taken, acknowledged or failed
``core/table.pxi``     keys and users, beginnings and ends: `SessionTable`
``core/prefetch.pxi``  fetching memory into the cache before it is needed
``core/batch.pxi``     saves of many sessions at a time
``core/calls.pxi``     awaited calls, done in one step if there is nothing to wait for: `ManagerCore`
``core/ages.pxi``      walks over the sessions, oldest first
``core/check.pxi``     the invariants of a table, and counts of objects, for debug builds
``core/timers.pxi``    the wheel by itself, for benchmarks and tests

Every list of rows is circular and has a sentinel, and the sentinels are rows themselves: the
first `FIRST_SLOT` rows of the array belong to the wheel's buckets, to the three lanes and to the two age lists. A
session's slot number is therefore never 0, and a row that is on no list is linked to itself.
"""

# With binding=False the methods are plain C methods: if they are taken from the class and called with an object of
# another type, they raise. Cython's own functions would read C fields that are not there. `inspect` reads their
# signatures in the form of Argument Clinic.

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_Clear, PyErr_Fetch, PyErr_Restore, PyErr_SetObject
from cpython.list cimport PyList_GET_ITEM, PyList_SET_ITEM
from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree, PyMem_RawRealloc
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.math cimport isfinite
from libc.string cimport memcmp, memset

import os
from types import GenericAlias

import orjson

from cagey_sessions.errors import (
    AlreadyIdentifiedError,
    EncodingError,
    InvalidKeyError,
    InvalidUserDataError,
    InvalidUserIdError,
    KeyTakenError,
    NotIdentifiedError,
    SessionEndedError,
    UnsavableError,
    UsageError,
    UserActiveError,
    WrongLoopError,
)
from cagey_sessions.wording import kind_name, quote

cdef extern from *:
    """
    #ifndef CAGEY_DEBUG
    #define CAGEY_DEBUG 0
    #endif
    #define CAGEY_NEVER UINT64_MAX
    #define CAGEY_LAST_VERSION ((1ULL << 53) - 1)
    #define CAGEY_MAX_SLOTS 0xFFFFFFF0u
    #if defined(_MSC_VER)
      #include <intrin.h>
      static inline unsigned cagey_lowest_bit(uint64_t word) {
        unsigned long at; _BitScanForward64(&at, word); return at; }
      static inline unsigned cagey_highest_bit(uint64_t word) {
        unsigned long at; _BitScanReverse64(&at, word); return at; }
    #else
      static inline unsigned cagey_lowest_bit(uint64_t word) { return (unsigned)__builtin_ctzll(word); }
      static inline unsigned cagey_highest_bit(uint64_t word) { return 63u - (unsigned)__builtin_clzll(word); }
    #endif
    /* The hook for asynchronous generators that the running event loop has set in this thread. */
    #define cagey_running_hook() (PyThreadState_Get()->async_gen_firstiter)
    /* A number that differs between all living threads; a register, where the compiler can read it. */
    #if defined(_WIN32)
      #define cagey_thread PyThread_get_thread_ident
    #elif defined(__has_builtin) && defined(__x86_64__) && defined(__linux__)
      #if __has_builtin(__builtin_thread_pointer)
        #define cagey_thread() ((unsigned long)__builtin_thread_pointer())
      #else
        #include <pthread.h>
        #define cagey_thread() ((unsigned long)pthread_self())
      #endif
    #else
      #include <pthread.h>
      #define cagey_thread() ((unsigned long)pthread_self())
    #endif
    /* The hash of a str, which caches it; not for subclasses. */
    static inline Py_hash_t cagey_hash_of_str(PyObject* text) {
        Py_hash_t hash = ((PyASCIIObject*)text)->hash;
        return hash != -1 ? hash : PyObject_Hash(text);
    }
    #define cagey_item_at(list, at) (&((PyListObject*)(list))->ob_item[at])
    /* The neighbours in the list of the garbage collector, which are written to when an object is freed. Only to be
       prefetched. */
    #ifdef Py_GIL_DISABLED
      #define cagey_neighbour(object, which) ((void*)(object))
    #else
      #define cagey_neighbour(object, which) (((void**)(object))[-1 - (which)])
    #endif
    /* type.__new__(type), without a look-up of the name. */
    #define cagey_new_object(type, no_arguments) ((PyTypeObject*)(type))->tp_new((PyTypeObject*)(type), no_arguments, NULL)
    """
    const bint CAGEY_DEBUG
    const uint64_t NEVER "CAGEY_NEVER"
    const uint64_t LAST_VERSION "CAGEY_LAST_VERSION"
    const uint32_t MAX_SLOTS "CAGEY_MAX_SLOTS"
    unsigned lowest_bit "cagey_lowest_bit"(uint64_t word) noexcept nogil
    unsigned highest_bit "cagey_highest_bit"(uint64_t word) noexcept nogil
    unsigned long current_thread "cagey_thread"() noexcept nogil
    Py_hash_t hash_of_str "cagey_hash_of_str"(object text) noexcept  # never fails
    int compare_text "PyUnicode_Compare"(PyObject*, PyObject*) noexcept  # of exactly str, never fails
    PyObject* running_hook "cagey_running_hook"() noexcept
    PyObject** item_at "cagey_item_at"(list, uint32_t) noexcept
    void* neighbour "cagey_neighbour"(PyObject*, int which) noexcept
    object new_object "cagey_new_object"(type, tuple no_arguments)

# Whether this is a debug build (CAGEY_SESSIONS_DEBUG=1). Only there do the `_check` methods check anything.
DEBUG = bool(CAGEY_DEBUG)


cdef struct Row:
    uint64_t deadline       # tick at which the wheel returns the row, or last did
    uint64_t saved_at       # tick at which the bytes last acknowledged were encoded; before that, when the user was set
    uint64_t version        # the version last taken; with a store, the version last encoded
    uint64_t acknowledged   # the version last acknowledged
    uint32_t next           # wheel bucket, lane or free list
    uint32_t prev
    uint32_t newer          # age list
    uint32_t older
    uint32_t ahead          # the row that is likely to follow GROUP places later on the list; only to be prefetched
    uint8_t state
    uint8_t failures        # saves failed since the last acknowledged one, at most 255
    uint8_t marks           # MARKED, MARKED_BEFORE: changes that may not be stored yet
    uint8_t flags           # FLAG_LOST, FLAG_FINAL, FLAG_RELEASED: what the host has said of the saves


include "core/values.pxi"
include "core/bodies.pxi"
include "core/digest.pxi"
include "core/wheel.pxi"
include "core/saves.pxi"
include "core/index.pxi"
include "core/session.pxi"
include "core/rows.pxi"
include "core/lanes.pxi"
include "core/table.pxi"
include "core/prefetch.pxi"
include "core/batch.pxi"
include "core/calls.pxi"
include "core/ages.pxi"
include "core/check.pxi"
include "core/timers.pxi"
