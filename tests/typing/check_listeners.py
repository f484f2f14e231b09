"""Listeners are checked against their event, and keep the type they have. Read by mypy and pyright, never run."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, assert_type

from cagey_sessions import Session, SessionManager, UnsavableError


class Player:
    gold: int


class Monster:
    rage: int


class Socket:
    async def close(self, code: int = 1000, reason: str | None = None) -> bool:
        return True


def registered(manager: SessionManager[Player], session: Session[Player]) -> None:
    @manager.on("persist_user_data")
    async def save(session: Session[Player]) -> None:
        assert_type(session.user_data, Player)

    kept: Callable[[Session[Player]], Coroutine[Any, Any, None]] = save

    @manager.once("error")
    def note(error: Exception, session: Session[Player] | None) -> int:
        return 1

    assert_type(note(error=ValueError(), session=None), int)

    @manager.on("unsavable")
    def repair(session: Session[Player], error: UnsavableError) -> None: ...

    assert_type(repair(session, error=UnsavableError("", user_id=1)), None)

    @manager.on("identified")
    def welcome(session: Session[Player], user_id: int | str, user_data: Player, *, loudly: bool = False) -> None: ...

    assert_type(welcome(session, "bob", Player(), loudly=True), None)

    @session.on("identified")
    def identified(user_id: int | str, user_data: Player) -> None: ...

    assert_type(identified("bob", user_data=Player()), None)

    @session.once("destroy")
    async def leave() -> None: ...

    del kept

    manager.off("error", note)
    session.off("identified", identified)


def given(manager: SessionManager[Player], session: Session[Player], socket: Socket) -> None:
    def come(session: Session[Player]) -> int:
        return 1

    assert_type(manager.on("created", come), Callable[[Session[Player]], int])
    manager.on("started", print)
    manager.once("created", lambda session: session.user_data.gold)
    manager.on("identified", lambda session, user_id, player: session.set("gold", player.gold))
    manager.on("error", lambda error, session: print(error, session and session.user_id))
    manager.on("unsavable", lambda session, error: print(session.user_id, error.path))
    session.on("destroy", socket.close)
    session.on("identified", lambda user_id, player: player.gold)
    manager.on("error", 5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    manager.on(5, come)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    manager.off("error")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def events_that_do_not_exist(manager: SessionManager[Player], session: Session[Player]) -> None:
    def come(session: Session[Player]) -> None: ...
    def leave() -> None: ...

    manager.on("beforeDestroy", come)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    manager.once("destroyed", come)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    manager.off("persist", come)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    session.on("created", leave)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    session.once("end", leave)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    session.off("error", leave)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    @manager.on("identify")  # type: ignore[call-overload, untyped-decorator]  # pyright: ignore[reportArgumentType, reportCallIssue]
    def one(session: Session[Player], user_id: int | str, player: Player) -> None: ...

    @session.once("created")  # type: ignore[call-overload, untyped-decorator]  # pyright: ignore[reportArgumentType, reportCallIssue]
    def two() -> None: ...


def listeners_that_do_not_fit(manager: SessionManager[Player], session: Session[Player]) -> None:
    def nothing() -> None: ...
    def one(session: Session[Player]) -> None: ...
    def two(session: Session[Player], user_id: int | str) -> None: ...
    def three(session: Session[Player], user_id: int | str, user_data: Player) -> None: ...
    def of_monsters(session: Session[Monster]) -> None: ...
    def by_number(user_id: int, user_data: Player) -> None: ...

    manager.on("created", nothing)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    manager.on("identified", two)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    manager.once("error", one)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    manager.once("persist_user_data", three)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    manager.on("created", of_monsters)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    session.on("destroy", one)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    session.on("identified", three)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    session.once("identified", by_number)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]

    @manager.on("destroy")  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    def left() -> None: ...

    @manager.once("identified")  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    def arrived(session: Session[Player]) -> None: ...

    @manager.on("error")  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    def failed(session: Session[Player], error: Exception) -> None: ...

    @manager.on("unsavable")  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    def unsavable(error: UnsavableError) -> None: ...

    @session.on("destroy")  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    def gone(session: Session[Player]) -> None: ...

    @session.once("identified")  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    async def known(session: Session[Player], user_id: int | str, player: Player) -> None: ...
