"""The workloads as airspeed velocity runs them, commit by commit. What must not live here: scenarios and goals.

`asv run` from the folder above the one with `asv.conf.json`; `make bench-adapters` runs each once to see that it works.
"""
