"""Listeners keep the type they have. Read by mypy and pyright, never run."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, assert_type

from cagey_sessions import Session, SessionManager


class Player:
    gold: int


def registered(manager: SessionManager[Player], session: Session[Player]) -> None:
    @manager.on("persist_user_data")
    async def save(session: Session[Player]) -> None:
        assert_type(session.user_data, Player)

    kept: Callable[[Session[Player]], Coroutine[Any, Any, None]] = save

    @manager.once("error")
    def note(error: Exception, session: Session[Player] | None) -> int:
        return 1

    assert_type(note(ValueError(), None), int)

    @session.on("identified")
    def identified(user_id: int | str, user_data: Player) -> None: ...

    assert_type(identified("bob", Player()), None)
    del kept

    manager.off("error", note)
    session.off("identified", identified)
    manager.on("error", 5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    manager.on(5, note)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    manager.off("error")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
