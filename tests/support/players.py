"""A table of players that is somebody else's, and stores on it. What must not be here: tests."""

from __future__ import annotations

import asyncpg
import orjson

from cagey_sessions.stores import PostgresTable
from support import POSTGRES as DSN
from support import execute


async def fetch(statement: str) -> list[tuple]:
    connection = await asyncpg.connect(DSN)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


# Their table

PLAYERS = """CREATE TABLE {schema}.players (
    id bigint PRIMARY KEY,
    email text,
    gold int NOT NULL DEFAULT 0,
    name varchar(5),
    speed double precision,
    banned boolean,
    bag json NOT NULL DEFAULT '[]',
    notes jsonb
)"""
COLUMNS = ["gold", "name", "speed", "banned", "bag", "notes"]
ANN = {"gold": 3, "name": "ann", "speed": 0.5, "banned": False, "bag": ["rope", {"é": None}], "notes": {"b": 1, "a": 2}}
FENCES = ["side_table", "none"]


def body(**changed):
    return orjson.dumps({**ANN, **changed})


def table(schema, name="players", *, pool=DSN, **settings):
    if "body" not in settings:
        settings = {"columns": ["gold"], **settings}
    return PostgresTable(pool, (schema, name), schema=schema, **settings)


async def players(schema, fence="side_table", **settings):
    """The table above, as it has always been, with one user."""
    settings = {"columns": COLUMNS, "fence": fence, **settings}
    store = table(schema, **settings)
    await execute(
        PLAYERS.format(schema=schema),
        f"INSERT INTO {schema}.players (id, email, gold, bag) VALUES (7, 'ann@example.org', 3, '[\"rope\"]')",
    )
    return store


async def claimed(store, *user_ids, owner="a"):
    return {each.user_id: each.epoch for each in await store.claim_many(user_ids, owner)}


SIDE = "cagey_sessions_fence_players"
