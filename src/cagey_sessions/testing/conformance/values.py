"""The tests that user ids, owners, numbers and bodies come back as they were, also at their bounds."""

from __future__ import annotations

import pytest

from .base import (
    BIG,
    INVALID,
    SAVED,
    Conformance,
    Make,
    claim,
    claims,
    everything,
    loaded,
    opened,
    record,
    release,
    save,
    stored,
)

__all__ = ["ODD_IDS", "Values"]

ODD_IDS: list[int | str] = [
    0,
    -1,
    2**63 - 1,
    -(2**63),
    "0",
    "-1",
    str(2**63 - 1),
    "1.0",
    "1e0",
    " 1",
    "01",
    "null",
    "NULL",
    "'; DROP TABLE cagey_sessions; --",
    '"quoted"',
    "back\\slash",
    "{curly}:*[brackets]?",
    "per%cent_under",
    "two\nlines\r\tand a tab",
    "Grüße",
    "gru\u0308ße",
    "日本語",
    "\U0001f409",
    "A",
    "a",
    "a ",
    "x" * 1024,
    "é" * 512,
]


class Values(Conformance):
    """User ids, owners, numbers and bodies."""

    async def test_a_number_and_its_text_are_two_users_everywhere(self, make: Make) -> None:
        async with opened(make()) as store:
            number, text = await claims(store, [1, "1"])
            assert (type(number.user_id), type(text.user_id)) == (int, str)
            assert await save(store, record("1", 7, epoch=text.epoch, body=b'"text"')) == [SAVED]
            assert await store.load(1) is None
            assert await save(store, record(1, 3, epoch=number.epoch, body=b'"number"')) == [SAVED]
            assert type((await stored(store, 1)).user_id) is int
            assert type((await stored(store, "1")).user_id) is str
            assert {key: each.body for key, each in (await everything(store)).items()} == {
                (int, 1): b'"number"',
                (str, "1"): b'"text"',
            }
            assert await release(store, "1", text.epoch, "a")
            assert await save(store, record(1, 4, epoch=number.epoch)) == [SAVED]
            assert await store.erase(1, "a")
            assert (await stored(store, "1")).body == b'"text"'
            assert (await loaded(store, "1")).version == 7
            assert (await claim(store, 1)).record is None

    async def test_odd_user_ids_are_kept_apart_and_come_back_as_they_were(self, make: Make) -> None:
        async with opened(make()) as store:
            answers = await claims(store, ODD_IDS)
            assert [(type(each.user_id), each.user_id) for each in answers] == [(type(each), each) for each in ODD_IDS]
            records = [
                record(each.user_id, place + 1, epoch=each.epoch, body=b"%d" % place)
                for place, each in enumerate(answers)
            ]
            assert await save(store, *records) == [SAVED] * len(ODD_IDS)
            assert await everything(store) == {(type(each.user_id), each.user_id): each for each in records}
            for each in records:
                assert await store.load(each.user_id) == each
            for each in records[::2]:
                assert await release(store, each.user_id, each.epoch, "a")
            for each in records[1::2]:
                assert await store.erase(each.user_id, "a")
            assert len(await everything(store)) == len(records[::2])

    async def test_owners_are_compared_as_they_are(self, make: Make) -> None:
        async with opened(make()) as store:
            owner = "host-é'\"{}\n:1234:" + "f" * 64
            epoch = (await claim(store, 1, owner)).epoch
            assert await save(store, record(epoch=epoch, owner=owner)) == [SAVED]
            assert (await stored(store, 1)).owner == owner
            assert await release(store, 1, epoch, owner)

    async def test_numbers_up_to_the_bound_come_back_exactly(self, make: Make) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            for version, schema, saved_at in [(1, 0, 0.0), (BIG - 1, 2**31 - 1, 1e-3), (BIG, 1, 4102444800.123456)]:
                kept = record(version=version, epoch=epoch, schema=schema, saved_at=saved_at)
                assert await save(store, kept) == [SAVED]
                back = await store.load(1)
                assert back == kept
                assert [type(each) for each in back] == [type(each) for each in kept]

    @pytest.mark.parametrize(
        "body",
        [
            b"{}",
            b"null",
            b"0",
            b'""',
            b"[ 1 , 2 ]",
            b"1.0",
            b"123456789012345678901234567890",
            '{"é":"\U0001f409\u2028"}'.encode(),
            b'{"b":1,"a":2,"b":3}',
            b'"' + b"x" * 1_000_000 + b'"',
            b"[" + b"1," * 300_000 + b"1]",
        ],
        ids=lambda body: body[:12].decode(errors="replace"),
    )
    async def test_a_body_comes_back_byte_for_byte(self, make: Make, body: bytes) -> None:
        async with opened(make()) as store:
            epoch = (await claim(store)).epoch
            assert await save(store, record(epoch=epoch, body=body)) == [SAVED]
            back = await store.load(1)
            assert type(back.body) is bytes
            assert back.body == body
            assert (await loaded(store)).body == body
            assert (await everything(store))[int, 1].body == body

    @pytest.mark.parametrize("poison", [b'"\\u0000"', b'"\0"', b"\xff", b'"\xed\xa0\x80"', b"{", b""], ids=repr)
    async def test_a_body_that_the_engine_refuses_makes_no_other_fail(self, make: Make, poison: bytes) -> None:
        """A store may refuse it or not; if it accepts it, it has to come back."""
        async with opened(make()) as store:
            epochs = {each.user_id: each.epoch for each in await claims(store, range(9))}
            records = [
                record(user, epoch=epoch, body=poison if user == 4 else b"[7]") for user, epoch in epochs.items()
            ]
            verdicts = await store.save_many(records)
            assert [verdict.outcome for verdict in verdicts[:4] + verdicts[5:]] == [SAVED] * 8
            assert verdicts[4].outcome in (SAVED, INVALID)
            if verdicts[4].outcome == SAVED:
                assert (await stored(store, 4)).body == poison
            else:
                assert verdicts[4].detail
                assert await store.load(4) is None
                assert await save(store, records[4]._replace(body=b"[8]")) == [SAVED]
            assert len(await everything(store)) == 9
