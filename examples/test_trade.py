"""Gold for a sword: a trade of two players that survives any crash or outage, tested in virtual time.
Run it: pytest examples/test_trade.py, or python examples/test_trade.py.
"""

import random

import pytest

from cagey_sessions import SessionManager, StoreUnavailableError
from cagey_sessions.testing import crash_test, world


def make_manager(store=None, clock=None):  # the server calls it with its real store, and no clock
    return SessionManager(store=store, clock=clock, interval="30s")


def new_player():
    return {"gold": 100, "swords": 5, "orders": {}, "answers": {}}


async def buy(manager, buyer, seller, price):
    buyer.user_data["gold"] -= price  # into the order, in the same step
    buyer.user_data["orders"][f"{random.getrandbits(64):x}"] = {"seller": seller, "price": price}
    await buyer.persist_now()
    await settle(manager, buyer)


async def settle(manager, buyer):
    """Carry out all orders of a player, each once. Call it at login, too, for what a crash has left."""
    for number, order in list(buyer.user_data["orders"].items()):
        async with manager.edit(order["seller"]) as seller:  # wherever they are; saved when the block is left
            if number not in seller["answers"]:
                seller["answers"][number] = is_sold = seller["swords"] > 0  # kept for ever here, a week in a game
                seller["swords"] -= is_sold
                seller["gold"] += is_sold * order["price"]
            is_sold = seller["answers"][number]
        if buyer.user_data["orders"].pop(number, None):
            buyer.user_data["swords"] += is_sold
            buyer.user_data["gold"] += (not is_sold) * order["price"]


def test_an_order_that_the_database_was_down_for_is_carried_out_afterwards():
    with world(make_manager) as here:
        here.put("bob", new_player())
        ann = here.open("ann", default=new_player)
        here.store_down("5m")
        with pytest.raises(StoreUnavailableError):
            here.run(buy(here.manager, ann, "bob", 10))
        here.advance("6m")
        here.run(settle(here.manager, ann))
        here.advance("31s")
        assert (here.stored("bob")["gold"], here.stored("bob")["swords"]) == (110, 4)
        assert (here.stored("ann")["gold"], here.stored("ann")["swords"]) == (90, 6)


async def market_day(manager):
    for name in ("ann", "bob"):
        await settle(manager, await manager.open(name, default=new_player))
    await manager.persist_all_user_data()
    for buyer, seller in [("ann", "bob"), ("bob", "ann")] * 4:
        await buy(manager, manager.find_by_user(buyer), seller, random.randrange(1, 9))


def nothing_is_lost(stored):
    gold = sum(player["gold"] for player in stored.values())
    swords = sum(player["swords"] for player in stored.values())
    for player in stored.values():
        for number, order in player["orders"].items():
            is_sold = stored[order["seller"]]["answers"].get(number, False)
            gold, swords = (gold, swords + 1) if is_sold else (gold + order["price"], swords)
    assert (gold, swords) == (100 * len(stored), 5 * len(stored))


def test_no_crash_at_any_moment_loses_gold_or_swords():
    crash_test(make_manager, market_day, nothing_is_lost)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
