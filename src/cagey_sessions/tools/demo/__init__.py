"""The demo: bots that play and note what the server has confirmed, while the server is stopped and killed.

`server` and `bots` are processes of their own. `run` starts, stops and kills them, `view` shows the progress, and
`verify` compares the database with the notes. Nothing is imported here, because all of them but `verify` need an extra.
"""
