"""A chat whose members are rows of your own table in PostgreSQL, with FastAPI. Nobody checks who a member is here.

psql "$DATABASE_URL" -c "CREATE TABLE members (name text PRIMARY KEY, email text, messages int, last text)"
python examples/chat_fastapi.py     # then connect to ws://127.0.0.1:8000/chat/ann, and look at /members/ann
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Path, Request, Response, WebSocket, WebSocketDisconnect, status

from cagey_sessions import ManagerClosedError, SessionEndedError, SessionManager, StoreError, UserNotFoundError
from cagey_sessions.stores import PostgresTable

Name = Annotated[str, Path(pattern=r"^\w{1,40}$")]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    store = PostgresTable(os.environ["DATABASE_URL"], "members", key="name", columns=["messages", "last"])
    async with SessionManager(store=store, interval="30s", user_id=str) as manager:
        yield {"manager": manager, "room": set()}
        # on SIGTERM uvicorn hangs up and comes back here; leaving the block makes everybody's last save


app = FastAPI(lifespan=lifespan)


async def hang_up(socket: WebSocket, code: int = status.WS_1000_NORMAL_CLOSURE) -> None:
    with suppress(WebSocketDisconnect, RuntimeError):  # already closed
        await socket.close(code)


@app.websocket("/chat/{name}")
async def chat(socket: WebSocket, name: Name) -> None:
    manager, room = socket.state.manager, socket.state.room
    await socket.accept()
    try:
        async with manager.create() as session:
            await session.login(name, default={"messages": 0, "last": ""})
            session.on("destroy", lambda: hang_up(socket))  # also when the member logs in elsewhere
            await socket.send_json(session.user_data)
            room.add(socket)
            async for text in socket.iter_text():
                session.user_data["messages"] += 1
                session.user_data["last"] = text
                said = [other.send_text(f"{name}: {text}") for other in room]
                await asyncio.gather(*said, return_exceptions=True)  # each handler sees to its own socket
    except (SessionEndedError, ManagerClosedError, WebSocketDisconnect):
        pass
    except StoreError:
        await hang_up(socket, status.WS_1013_TRY_AGAIN_LATER)
    finally:
        room.discard(socket)


@app.get("/members/{name}")
async def member(request: Request, name: Name) -> Any:
    try:
        return await request.state.manager.read(name)  # as it is now, connected or not
    except UserNotFoundError:
        raise HTTPException(status.HTTP_404_NOT_FOUND) from None


@app.get("/health")
async def health(request: Request, response: Response) -> Any:
    found = request.state.manager.health()
    response.status_code = status.HTTP_200_OK if found else status.HTTP_503_SERVICE_UNAVAILABLE
    return {"state": found.state}  # the reason may name members


if __name__ == "__main__":
    # 2 seconds for the connections, then up to 25 for the last saves; Kubernetes kills after 30
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")), timeout_graceful_shutdown=2)
