async def test_smoke(make_manager, db, clock):
    manager = make_manager()
    session = await manager.create("k")
    await session.set_user(7, {"gold": 1})
    await clock.advance("31s")
    assert db.stored == {7: {"gold": 1}}
    session.user_data["gold"] = 2
    await manager.destroy(True)
    assert db.stored == {7: {"gold": 2}}
    assert clock.pending == 0
