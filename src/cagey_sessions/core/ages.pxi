# Sessions by age.
#
# What lives here: `OldestFirst`, a walk over one of the two age lists that survives changes. What must not: the choice of
# what an age is; the table puts a row at the young end when its user is set and each time a save is acknowledged.
#
# Invariants
#   - A bookmark is a row without a session: its state is GONE, and it is on an age list and on no other list.
#
# Cost: O(1) a step.

@cython.final
cdef class OldestFirst:
    """A walk over one age list that stays correct while sessions join, leave and are saved.

    The walk stops where the list ended when it began. So it comes to an end although saves move sessions to the young
    end, and it yields each session at most once. It does not yield a session that was acknowledged before its turn; a
    caller who needs these too has to wait for the saves in flight. With `to_the_end` the walk goes on to the end of
    the list as it is when it gets there: it misses no session, and may yield one twice.

    Two bookmarks, rows without a session, stand in the list for the current place and for the end. Call `close` when
    done; a walk that is not closed costs the table these two rows. O(1) a step.
    """
    cdef SessionTable table
    cdef uint32_t here
    cdef uint32_t end

    def __cinit__(self, SessionTable table not None, bint identified, bint to_the_end):
        table.check_thread()
        cdef uint32_t age_list = IDENTIFIED if identified else ANONYMOUS
        self.table = table
        self.here = table.allocate()
        self.end = age_list
        cdef uint32_t oldest = table.rows[age_list].newer
        table.rows[self.here].older = age_list
        table.rows[self.here].newer = oldest
        table.rows[oldest].older = self.here
        table.rows[age_list].newer = self.here
        if not to_the_end:
            # Only once the first bookmark is in the list: growing may start a collection, which may run any code.
            try:
                self.end = table.allocate()
            except BaseException:
                table.age_remove(self.here)
                table.release(self.here)
                raise
            table.age_append(age_list, self.end)
            table.walks += 1

    def __iter__(self):
        return self

    def __next__(self):
        cdef SessionTable table = self.table
        cdef uint32_t slot
        if table is None:
            raise StopIteration
        table.check_thread()
        cdef Row* rows = table.rows
        while True:
            slot = rows[self.here].newer
            if slot == self.end:
                raise StopIteration
            # the bookmark and the next row change places
            rows[rows[self.here].older].newer = slot
            rows[slot].older = rows[self.here].older
            rows[self.here].newer = rows[slot].newer
            rows[rows[slot].newer].older = self.here
            rows[slot].newer = self.here
            rows[self.here].older = slot
            if rows[slot].state != GONE:
                return table.sessions[slot]

    def close(self):
        """Take the bookmarks out of the list. Idempotent."""
        cdef SessionTable table = self.table
        if table is None:
            return
        table.check_thread()
        self.table = None
        table.walks -= self.end >= FIRST_SLOT
        for slot in (self.here, self.end):
            if slot >= FIRST_SLOT:
                table.age_remove(slot)
                table.release(slot)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()
