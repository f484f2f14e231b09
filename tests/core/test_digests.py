"""Digests are SipHash-1-3, and take a key of 16 bytes and bytes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cagey_sessions._core import Digest


def siphash13(data: bytes, key: bytes) -> int:
    """From the paper, with one round a word and three at the end."""
    mask = 2**64 - 1
    k0, k1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rotl(x: int, bits: int) -> int:
        return (x << bits | x >> (64 - bits)) & mask

    def rounds(count: int) -> None:
        for _ in range(count):
            v[0] = (v[0] + v[1]) & mask
            v[1] = rotl(v[1], 13) ^ v[0]
            v[0] = rotl(v[0], 32)
            v[2] = (v[2] + v[3]) & mask
            v[3] = rotl(v[3], 16) ^ v[2]
            v[0] = (v[0] + v[3]) & mask
            v[3] = rotl(v[3], 21) ^ v[0]
            v[2] = (v[2] + v[1]) & mask
            v[1] = rotl(v[1], 17) ^ v[2]
            v[2] = rotl(v[2], 32)

    padded = data + bytes(-(len(data) + 1) % 8) + bytes([len(data) & 0xFF])
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        v[3] ^= word
        rounds(1)
        v[0] ^= word
    v[2] ^= 0xFF
    rounds(3)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.binary(min_size=16, max_size=16))
def test_a_digest_is_siphash_1_3(body, key):
    assert Digest(key)(body) == siphash13(body, key)


def test_a_digest_is_that_of_the_published_vectors():
    """For the key 00 01 … 0f, and messages of the first so many bytes of it."""
    digest = Digest(bytes(range(16)))
    vectors = {
        0: 0xABAC0158050FC4DC,
        1: 0xC9F49BF37D57CA93,
        2: 0x82CB9B024DC7D44D,
        3: 0x8BF80AB8E7DDF7FB,
        8: 0x369095118D299A8E,
    }
    assert {size: digest(bytes(range(size))) for size in vectors} == vectors


# what is compared with is Python's own SipHash-1-3; one built with another function has none to compare with
@pytest.mark.skipif(sys.hash_info.algorithm != "siphash13", reason="this Python hashes bytes by another function")
@pytest.mark.parametrize("seed", [0, 1, 4711])
def test_a_digest_is_what_python_itself_makes_of_bytes(seed):
    """PYTHONHASHSEED fixes Python's own key: zeros for 0, else the numbers of a generator that is in its sources."""
    key, state = bytearray(), seed
    for _ in range(16):
        state = (state * 214013 + 2531011) % 2**32
        key.append(state >> 16 & 0xFF)
    digest = Digest(bytes(key) if seed else bytes(16))
    made = "[bytes(at * 7 & 0xFF for at in range(size)) for size in range(1, 200)]"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"print([hash(body) % 2**64 for body in {made}])"],
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [digest(body) for body in eval(made)]


def test_a_digest_takes_a_key_of_16_bytes_and_bytes():
    for key in (b"", bytes(15), bytes(17)):
        with pytest.raises(ValueError, match="16 bytes"):
            Digest(key)
    digest = Digest(bytes(16))
    for body in (None, "text", bytearray(), memoryview(b"")):
        with pytest.raises(TypeError):
            digest(body)
    with pytest.raises(TypeError):
        copy.copy(digest)
    assert 0 < digest(b"") < 2**64
