"""The command line. What lives here: ``cagey-sessions``, its tools for stores, and its demo. What must not: anything
that the library needs, because a server never imports this package.
"""
