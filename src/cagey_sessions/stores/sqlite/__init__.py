"""Users in a SQLite file."""
