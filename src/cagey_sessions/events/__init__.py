"""What listeners hear. What lives here: listeners, errors that no caller waits for, deadlock detection. What must
not: what an event is for.
"""
