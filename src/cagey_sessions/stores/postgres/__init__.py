"""The stores in PostgreSQL: `PostgresStore` with a table of ours in `store.py`, `PostgresTable` in `own_table.py`.

Both build on `engine.py`: connections, leases, and what errors of the driver mean.
"""
