"""Files of users. What lives here: the format of snapshots and spill files, and who is in a spill. What must not:
when they are written.
"""
