"""Coverage of the core. What lives here: the plugin that `make coverage` has coverage.py ask, which is Cython's but for
the lines that run while the module is imported. What must not: tests.

Cython notes such lines - the heads of functions, constants, decorators - under the one file that includes all others,
so that in those none of them ever seems to run. They are left out; what stands in the bodies of functions is counted.
"""

from __future__ import annotations

import re
from pathlib import Path

from Cython import Coverage

HEAD = re.compile(r"( *)(?:async def|def|cpdef|cdef(?! (?:class|extern|struct|enum))\b[^=]*\() ?")


def lines_of_bodies(source: str) -> set[int]:
    """The numbers of the lines that stand in the body of a function."""
    inside: set[int] = set()
    indent, in_head = -1, False
    for number, line in enumerate(source.splitlines(), 1):
        if in_head:
            in_head = not line.split("  #")[0].rstrip().endswith(":")
            continue
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth <= indent:
            indent = -1
        if indent == -1 and (head := HEAD.match(line)):
            indent = len(head[1])
            in_head = not line.split("  #")[0].rstrip().endswith(":")
        elif indent >= 0:
            inside.add(number)
    return inside


class Plugin(Coverage.Plugin):
    """Cython's, for which only the bodies of functions count."""

    def file_reporter(self, filename):
        reporter = super().file_reporter(filename)
        if reporter is not None and Path(filename).exists():  # some of what Cython adds stands in no file
            inside = lines_of_bodies(Path(filename).read_text(encoding="utf-8"))
            reporter._code = {number: text for number, text in reporter._code.items() if number in inside}
        return reporter


def coverage_init(registry, options):
    plugin = Plugin()
    registry.add_configurer(plugin)
    registry.add_file_tracer(plugin)
