"""When and how users are saved. What lives here: the timer, batches, what the store answers, retries. What must not:
the end of a session.
"""
