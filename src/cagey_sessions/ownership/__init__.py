"""Whose a user is. What lives here: turns with a user, claims and releases in the store. What must not: data."""
