"""`RedisStore`: the store in `store.py`, the scripts, connections and errors of the engine in `engine.py`."""
