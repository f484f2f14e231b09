"""The demo: players who know what they were promised, and a server that is stopped and killed under them.

`server` and `bots` are processes of their own, `run` starts, stops and kills them, `view` shows how it goes, and
`verify` compares. What lives here: nothing. What must not: an import, for all of them but `verify` need an extra.
"""
