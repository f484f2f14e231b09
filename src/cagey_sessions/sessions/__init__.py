"""A session from beginning to end. What lives here: manager, session, login, ends, the drain. What must not: how a
save is made.
"""
