"""The two codecs. Read by mypy and pyright, never run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, assert_type

import msgspec

from cagey_sessions import Codec, Session, SessionManager, dataclass_codec, msgspec_codec
from cagey_sessions.stores import MemoryStore


@dataclass
class Player:
    gold: int = 0


class Hero(msgspec.Struct):
    gold: int = 0


class Villain(msgspec.Struct):
    rage: int = 0


assert_type(dataclass_codec(Player), Codec[Player])
assert_type(dataclass_codec(Player, unknown="drop").decode, Callable[[Any], Player])
assert_type(dataclass_codec(Player).encode, Callable[[Player], Any])
dataclass_codec(Player, unknown="keep")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
dataclass_codec(Player())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
dataclass_codec(Player).encode(Hero())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

assert_type(msgspec_codec(Hero), Codec[Hero])
either: Codec[Hero | Villain] = msgspec_codec(Hero | Villain)
heroes = msgspec_codec(Hero)
assert_type(heroes.decode({}), Hero)
heroes.encode(Villain())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def flows() -> None:
    manager = SessionManager(store=MemoryStore(), encode=heroes.encode, decode=heroes.decode)
    assert_type(await manager.open("bob", default=Hero), Session[Hero])
    assert_type((await manager.open("bob")).user_data.gold, int)

    both = SessionManager(store=MemoryStore(), encode=either.encode, decode=either.decode)
    assert_type(await both.read("bob"), Hero | Villain)
    await both.open("bob", default=Player)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
