"""Whether operations of the core keep anything: ``python -m corecheck.leaks NAME...``, or all of them without a name.

What lives here: doing an operation very often and weighing the process before and after. What must not: the operations.

Each is weighed in four ways, since each misses something: blocks of Python's allocator (exact, but blind to the rows),
the size of the process (sees everything, roughly), references to what the operation was given, and objects that the
collector, or a debug build, can count.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections import Counter
from pathlib import Path

from cagey_sessions import _core as core

from .operations import OPERATIONS, World

SECONDS = float(os.environ.get("CAGEY_TEST_LEAK_SECONDS", "0.1"))
"""For how long each is done, once warm."""
FEWEST = 300
ATTEMPTS = 3
"""How often a process that has grown is weighed: a leak is there each time, what waits for the collector is not."""
SPARE_BLOCKS = 200
"""What Python, and weighing, may still take: what leaks does so each time, or at least once in twenty."""
SPARE_BYTES = 1 << 19
SIZE = Path("/proc/self/statm")


def resident() -> int:
    """The size of the process in bytes, or 0 where the system does not say."""
    return int(SIZE.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if SIZE.exists() else 0


Weight = tuple[int, int, list[int], Counter[str]]


def weigh(world: World) -> Weight:
    for _ in range(3):
        gc.collect()
    watched = world.watched()
    held = [sys.getrefcount(each) for each in watched]
    del watched
    objects = Counter(type(each).__name__ for each in gc.get_objects())
    objects.update({f"living {name}": count for name, count in core.living().items()})
    return sys.getallocatedblocks(), resident(), held, objects


def keep_doing(name: str, world: World, seconds: float) -> int:
    call = OPERATIONS[name]
    until = time.perf_counter() + seconds
    done = 0
    while done < FEWEST or time.perf_counter() < until:
        for _ in range(50):
            call(world)
        done += 50
    return done


def leaks(name: str, seconds: float = SECONDS) -> tuple[int, list[str]]:
    """How often an operation was done, and what it kept."""
    world = World()
    keep_doing(name, world, seconds / 3)
    weigh(world)  # the first one fills caches of its own
    before = weigh(world)
    total = 0
    for _ in range(ATTEMPTS):
        done = keep_doing(name, world, seconds)
        after = weigh(world)
        total += done
        kept = what_is_kept(world, done, before, after)
        grown = after[1] - before[1]
        if grown <= SPARE_BYTES + done // 20:
            return total, kept
        kept.append(f"{grown / done:.0f} bytes each time")
        if len(kept) > 1:
            break
        before = after
    return total, kept


def what_is_kept(world: World, done: int, before: Weight, after: Weight) -> list[str]:
    """By the weights that are exact."""
    blocks, _, held, objects = before
    blocks_after, _, held_after, objects_after = after
    kept = []
    if blocks_after - blocks > SPARE_BLOCKS + done // 20:
        kept.append(f"{(blocks_after - blocks) / done:.2f} blocks each time")
    if held_after != held:
        changed = [
            f"{type(each).__name__} {now - then:+}"
            for each, then, now in zip(world.watched(), held, held_after, strict=True)
            if then != now
        ]
        kept.append(f"references: {', '.join(changed)}")
    more = objects_after - objects
    kept += [f"{more[kind]} more of {kind}" for kind in more if more[kind] > 2]
    return kept


def main(names: list[str]) -> int:
    """The exit status: 1 if something was kept. One line for each operation that keeps something, then a sum."""
    total = worst = 0
    for name in names or OPERATIONS:
        done, kept = leaks(name)
        total += done
        worst += bool(kept)
        if kept:
            print(f"{name}: {'; '.join(kept)}, {done:,} times")
    print(f"{total:,} operations")
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
