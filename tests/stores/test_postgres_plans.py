"""What PostgreSQL does for a batch: it finds the rows by their keys, whatever it believes to know of the others."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from cagey_sessions.stores import PostgresStore, PostgresTable
from cagey_sessions.stores.postgres import fences
from cagey_sessions.stores.postgres import store as users_table
from support import POSTGRES, needs_server

pytestmark = needs_server(POSTGRES)

USERS, BATCH = 20_000, 200
OWNER = "the-server-of-today"
NUMBERS = [1] * BATCH

# Each statement about a batch, by name, and its parameters after the keys.
OF_USERS: dict[str, tuple[Any, ...]] = {
    "SAVE": (NUMBERS, NUMBERS, ["{}"] * BATCH, [1.0] * BATCH, OWNER, 0, []),
    "RELEASE": (NUMBERS, OWNER),
    "RELEASE_REPEATED": (NUMBERS, NUMBERS, OWNER),
    "DELETE_UNSAVED": (NUMBERS,),
}
OF_A_TABLE: dict[str, tuple[Any, ...]] = {
    "SETTLE": (NUMBERS, [False] * BATCH, [False] * BATCH, OWNER),
    "RELEASE": (NUMBERS, OWNER),
    "RELEASE_REPEATED": (NUMBERS, [OWNER] * BATCH, NUMBERS),
    "DELETE_UNSAVED": (NUMBERS,),
}


async def plan_of(connection: asyncpg.Connection[Any], statement: str, *parameters: object) -> str:
    return "\n".join(row[0] for row in await connection.fetch(f"EXPLAIN {statement}", *parameters))


def is_quadratic(plan: str) -> bool:
    """Whether each row of the table is compared with each of the batch."""
    return "Nested Loop" in plan and "Seq Scan" in plan


@pytest.mark.fault("a server that was just started saved 200 users in 430 ms: PostgreSQL took its rows for none")
@pytest.mark.parametrize("analyzed", [False, True])
async def test_no_batch_compares_each_row_with_each_user(schema, analyzed):
    store = PostgresStore(POSTGRES, schema=schema)
    await store.open()
    connection = await asyncpg.connect(POSTGRES)
    try:
        await connection.execute(f"""INSERT INTO "{schema}".cagey_sessions
            SELECT 's:' || i, 1, 'a-server-before', true, 1, 0, '{{}}', 1.0, false
                FROM generate_series(1, {USERS}) AS numbers (i)""")
        if analyzed:
            await connection.execute(f'ANALYZE "{schema}".cagey_sessions')
        keys = [f"s:{number}" for number in range(BATCH)]
        for name, parameters in OF_USERS.items():
            plan = await plan_of(connection, store._sql(getattr(users_table, name)), keys, *parameters)
            assert not is_quadratic(plan), f"{name}\n{plan}"
    finally:
        await connection.close()
        await store.close()


@pytest.mark.parametrize("analyzed", [False, True])
async def test_no_batch_of_a_table_of_the_program_does_either(schema, analyzed):
    connection = await asyncpg.connect(POSTGRES)
    await connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
    await connection.execute(f'CREATE TABLE "{schema}".players (id bigint PRIMARY KEY, data jsonb)')
    store = PostgresTable(POSTGRES, (schema, "players"), key="id", body="data", schema=schema)
    await store.open()
    try:
        await connection.execute(
            f"INSERT INTO \"{schema}\".players SELECT i, '{{}}' FROM generate_series(1, {USERS}) i"
        )
        await connection.execute(f"""INSERT INTO {store._names["fence"]}
            SELECT i, 1, 'a-server-before', true, 1, 0, 1.0, false, false FROM generate_series(1, {USERS}) i""")
        if analyzed:
            await connection.execute(f'ANALYZE "{schema}".players, {store._names["fence"]}')
        for name, parameters in OF_A_TABLE.items():
            plan = await plan_of(connection, store._sql(getattr(fences, name)), list(range(BATCH)), *parameters)
            assert not is_quadratic(plan), f"{name}\n{plan}"
    finally:
        await store.close()
        await connection.close()
