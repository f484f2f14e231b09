"""Builds the one extension. Everything else stands in pyproject.toml.

Switches, all off by default, read from the environment:
``CAGEY_SESSIONS_DEBUG``     assertions and structure checks in the core
``CAGEY_SESSIONS_SANITIZE``  AddressSanitizer and UndefinedBehaviorSanitizer; the interpreter has to preload libasan
``CAGEY_SESSIONS_TRACE``     line tracing, for coverage
``CFLAGS``                   as ever; a level of optimization in it takes the place of ours
"""

import os
import shutil
import sys
import sysconfig
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def flag(name):
    return os.environ.get("CAGEY_SESSIONS_" + name, "") not in ("", "0")


class BuildCore(build_ext):
    """Says what is missing before the compiler does it in its own words."""

    def build_extensions(self):
        if sys.platform != "win32":
            compiler = self.compiler.compiler_so[0]
            if shutil.which(compiler) is None:
                raise SystemExit(
                    f"\ncagey-sessions: its core is compiled here, and the C compiler {compiler!r} was not found.\n"
                    "Install one (Debian, Ubuntu: apt install gcc; Fedora: dnf install gcc; "
                    "macOS: xcode-select --install),\n"
                    "or install a ready-made wheel with: pip install --only-binary cagey-sessions cagey-sessions\n"
                )
            include = sysconfig.get_path("include")
            searched = [include, *self.compiler.include_dirs]
            if not any(os.path.exists(os.path.join(folder, "Python.h")) for folder in searched):
                version = f"{sys.version_info.major}.{sys.version_info.minor}"
                raise SystemExit(
                    f"\ncagey-sessions: its core is compiled here, and the headers of Python {version} were not found "
                    f"(no Python.h in {include}).\n"
                    f"Install them (Debian, Ubuntu: apt install python{version}-dev; "
                    "Fedora: dnf install python3-devel),\n"
                    "or install a ready-made wheel with: pip install --only-binary cagey-sessions cagey-sessions\n"
                )
        super().build_extensions()


SRC, WINDOWS = "src/cagey_sessions/", sys.platform == "win32"
cflags = [] if WINDOWS else ["-g0", "-Wall"]
if not WINDOWS and not any(word.startswith("-O") for word in os.environ.get("CFLAGS", "").split()):
    cflags.insert(0, "-O3")  # of two levels the compiler takes the last one, and ours come last
lflags, macros, directives = [], [], {}
if flag("DEBUG"):
    cflags, macros = (["/Od", "/Zi"] if WINDOWS else ["-O0", "-g3", "-UNDEBUG", "-Wall"]), [("CAGEY_DEBUG", "1")]
if flag("SANITIZE") and not WINDOWS:
    # undefined behaviour ends the process, as a bad address does: a report alone would fail no test
    cflags += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    lflags += ["-fsanitize=address,undefined"]
if flag("TRACE"):
    directives["linetrace"] = True
    macros += [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")]
core = Extension(
    "cagey_sessions._core",
    [SRC + "_core.pyx"],
    depends=sorted(glob(SRC + "**/*.px[di]", recursive=True)),
    define_macros=macros,
    extra_compile_args=cflags,
    extra_link_args=lflags,
)
core.cython_directives = directives  # read by Cython's build_ext
setup(ext_modules=[core], cmdclass={"build_ext": BuildCore})
