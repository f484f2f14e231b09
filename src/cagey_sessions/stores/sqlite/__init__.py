"""`SQLiteStore`: the writer thread and its transactions in `store.py`, the statements about users in `rows.py`."""
