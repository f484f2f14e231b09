"""The command line. What lives here: `cagey-sessions` and its demo. What must not: anything that the library
imports.
"""
