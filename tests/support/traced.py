"""Coverage of the core. What lives here: the plugin that `make coverage` has coverage.py ask. What must not: tests.

It reports what Cython's own does, but for the lines that run while the module is imported: the heads of functions,
constants, decorators. Cython notes those under the one file that includes all others, so that in those none of them
ever seems to run. They are left out; what stands in the bodies of functions is counted.

It traces in its own way. Cython's is asked for the file of each call and for the number of each line, in Python, which
makes a core that hashes a byte at a time a hundred times slower; and it looks for each file from the folder that the
program is in when that file first runs, which may be anywhere, and at the end of the interpreter is nowhere.
"""

from __future__ import annotations

import importlib.util
import re
from operator import attrgetter
from pathlib import Path

from coverage import FileTracer
from Cython import Coverage

PACKAGE = Path(importlib.util.find_spec("cagey_sessions").origin).parent
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


class Source(FileTracer):
    """A source of the core, which Cython names from the folder that it was built in."""

    line_number_range = attrgetter("f_lineno", "f_lineno")  # asked for each line: no Python is run for it

    def __init__(self, path: Path) -> None:
        self.path = path

    def source_filename(self):
        return str(self.path)


class Plugin(Coverage.Plugin):
    """Cython's, for which only the bodies of functions count."""

    def file_tracer(self, filename):
        _, found, inside = filename.rpartition("/src/cagey_sessions/")
        if not found or not inside.endswith((".pyx", ".pxi")):
            return None
        return Source(PACKAGE / inside)

    def file_reporter(self, filename):
        self._read_source_lines(str(PACKAGE / "_core.c"), filename)
        reporter = super().file_reporter(filename)
        if reporter is not None and Path(filename).exists():  # some of what Cython adds stands in no file
            inside = lines_of_bodies(Path(filename).read_text(encoding="utf-8"))
            reporter._code = {number: text for number, text in reporter._code.items() if number in inside}
        return reporter


def coverage_init(registry, options):
    plugin = Plugin()
    registry.add_configurer(plugin)
    registry.add_file_tracer(plugin)
