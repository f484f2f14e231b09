"""The shape of the package: floors, exports, dependencies, and what importing it brings along."""

from __future__ import annotations

import ast
import importlib
import inspect
import pydoc
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import cagey_sessions

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "src" / "cagey_sessions"

FLOORS = [
    {"_version", "records", "clock", "paths", "threads", "wording"},
    {"errors"},
    {"_core", "options", "user_code"},
    {"loop", "data", "process"},
    {"stores", "events"},
    {"files", "ownership"},
    {"saving"},
    {"sessions"},
    {"__init__"},
    {"testing", "tools"},
    {"__main__"},
]
"""From the ground up; a module imports only from floors below its own, or within its own folder."""

FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_rooms(path: Path) -> set[str]:
    """The rooms of this package that a module imports, anywhere in it, for type checkers too."""
    depth = len(path.relative_to(PACKAGE).parts)
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == depth:
                rooms |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
            elif node.level == 0 and module.split(".")[0] == "cagey_sessions":
                rooms |= {module.split(".")[1]} if "." in module else {"__init__"}
        elif isinstance(node, ast.Import):
            rooms |= {
                (alias.name + ".__init__").split(".")[1]
                for alias in node.names
                if alias.name.startswith("cagey_sessions")
            }
    return rooms


def test_imports_only_point_down():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        here = room(path)
        assert here in FLOOR_OF, f"{path.name} has no floor"
        above = [other for other in imported_rooms(path) if other != here and FLOOR_OF[other] >= FLOOR_OF[here]]
        wrong += [f"{here} imports {other}" for other in above]
    assert not wrong
    assert len(imported_rooms(PACKAGE / "sessions" / "server.py")) > 5, "the parser sees imports"


PUBLIC_PACKAGES = ("stores", "testing")
MOST_NAMES = 8
PARTS_OF_STORES = {"contract", "file_lock", "link", "memory", "rows", "urls"}
"""Modules of `stores` that are fronts themselves: for those who write a store, and for the rest of the library."""


def front(package: str) -> set[str]:
    """The names that a package has for the other ones; a module among them is one with all that is in it."""
    module = importlib.import_module(f"cagey_sessions.{package}")
    return set(getattr(module, "__all__", ())) | (PARTS_OF_STORES if package == "stores" else set())


def imports_of_others(path: Path) -> Iterator[tuple[str, str]]:
    """The packages that a module imports something from, besides its own, and the name or the module that it takes."""
    parts = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
            package, *inner = [part for part in module if part] or [""]
            if package and package != parts[0] and (PACKAGE / package).is_dir():
                yield from ((package, inner[0] if inner else alias.name) for alias in node.names)


def test_from_outside_only_the_front_of_a_package_is_imported():
    packages = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    assert len(packages) == 9
    for package in packages:
        assert package in PUBLIC_PACKAGES or len(front(package)) <= MOST_NAMES, package
    taken = [(path, *each) for path in PACKAGE.rglob("*.py") for each in imports_of_others(path)]
    wrong = [
        f"{path.relative_to(PACKAGE)} takes {name} of {package}"
        for path, package, name in taken
        if name not in front(package) and path.name != "__main__.py"
    ]
    assert not wrong
    assert len(taken) > 100, "the parser sees imports"


def test_every_package_says_what_lives_there_and_what_must_not():
    """And so does every file of the core; a module says in its first sentence what it does."""
    packages = [path for path in PACKAGE.glob("*/__init__.py") if path.parent.name not in ("stores", "testing")]
    for path in [*packages, *PACKAGE.glob("core/*.pxi"), PACKAGE / "_core.pyx"]:
        head = " ".join(path.read_text(encoding="utf-8")[:1500].replace("#", " ").split())
        assert "What lives here:" in head, path
        assert "must not:" in head, path
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem == "_version", path


def test_completion_shows_the_public_names():
    importlib.import_module("cagey_sessions.testing")
    shown = {name for name in dir(cagey_sessions) if not name.startswith("_")}
    assert shown == (set(cagey_sessions.__all__) - {"__version__"}) | {"stores", "testing"}


def test_the_public_names_are_those_of_all():
    public = {name for name in vars(cagey_sessions) if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(cagey_sessions, name), type(sys))}
    assert public - modules == set(cagey_sessions.__all__) - {"__version__"}
    assert len(set(cagey_sessions.__all__)) == len(cagey_sessions.__all__)


PUBLIC = ("cagey_sessions", "cagey_sessions.stores", "cagey_sessions.testing")


def test_every_name_a_module_exports_is_there_once():
    names = [".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in PACKAGE.rglob("*.py")]
    exporting = 0
    for name in sorted(names):
        module = importlib.import_module(name.removesuffix(".__init__"))
        exported = getattr(module, "__all__", ())
        assert len(set(exported)) == len(exported), name
        assert [each for each in exported if not hasattr(module, each)] == [], name
        exporting += bool(exported)
    assert exporting > 30, "the modules have been found"


def undocumented(holder: type) -> list[str]:
    """Public methods and properties of a class that say nothing, those left aside that a base class explains."""
    silent = []
    for name, member in vars(holder).items():
        inherited = any(hasattr(base, name) for base in holder.__mro__[1:] if base.__module__ in ("builtins", "typing"))
        if name.startswith("_") or inherited or not (inspect.isroutine(member) or isinstance(member, property)):
            continue
        if not inspect.getdoc(getattr(holder, name)):
            silent.append(f"{holder.__name__}.{name}")
    return silent


def test_every_public_name_says_what_it_is():
    silent = []
    for package in PUBLIC:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isroutine(value):
                silent += [] if value.__doc__ else [name]
                silent += undocumented(value) if inspect.isclass(value) else []
    assert silent == []


def public_calls() -> dict[str, object]:
    """Every public function and class, and every public method of a public class, inherited ones of ours included."""
    calls: dict[str, object] = {}
    for package in PUBLIC:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                ours = {each for kind in value.__mro__ if kind.__module__.startswith("cagey") for each in vars(kind)}
                members = ((f"{name}.{each}", getattr(value, each)) for each in ours if not each.startswith("_"))
                calls |= {each: member for each, member in members if inspect.isroutine(member)}
            if inspect.isroutine(value) or inspect.isclass(value):
                calls[name] = value
    return calls


def test_every_public_call_shows_what_it_takes():
    """As `help` prints it: no default is an address in memory."""
    shown = {}
    for name, call in public_calls().items():
        made_by_others = call in (cagey_sessions.Session, cagey_sessions.SessionCall)
        if not made_by_others and not (inspect.isclass(call) and issubclass(call, BaseException)):
            shown[name] = str(inspect.signature(call))
            assert " at 0x" not in pydoc.render_doc(call).partition("\n")[2], name
    assert "default: 'T | Callable[[], T]' = <no default>" in shown["SessionManager.open"]
    assert shown["Session.get"] == "(self, /, key, default=None)"
    assert len(shown) > 100


def declared(path: str, holder: str) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """The methods of a class as a file declares them, for type checkers or for all; the last of a name counts."""
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == holder)
    functions = [node for node in ast.walk(found) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node.name: node for node in functions}


@pytest.mark.parametrize(
    ("cls", "stub", "own"),
    [
        (cagey_sessions.SessionManager, "ManagerCore", ("sessions/manager.py", "SessionManager")),
        (cagey_sessions.Session, "SessionCore", ("sessions/session.py", "Session")),
    ],
)
def test_the_help_of_a_compiled_call_begins_with_its_types(cls, stub, own):
    """They are those that type checkers see."""
    types = declared("_core.pyi", stub) | declared(*own)
    compiled = [name for name, call in vars(cls).items() if inspect.ismethoddescriptor(call) and name[0] != "_"]
    assert len(compiled) > 1
    for name in compiled:
        first, _, rest = inspect.getdoc(getattr(cls, name)).partition("\n\n")
        is_async = first.startswith("async ")
        shown = ast.parse(f"{'async ' * is_async}def {first.removeprefix('async ')}: ...").body[0]
        assert ast.dump(shown.args) == ast.dump(types[name].args), first
        assert ast.dump(shown.returns) == ast.dump(types[name].returns), first
        assert type(shown) is type(types[name]) and shown.name == name, first
        assert rest


def test_only_two_dependencies_are_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {requirement.split(">")[0] for requirement in project["dependencies"]}
    assert names == {"orjson", "pytimeparse"}
    assert {"uvloop", "postgres", "demo", "test", "dev"} <= set(project["optional-dependencies"])


def modules_after(script: str) -> set[str]:
    """The modules a fresh interpreter has once it has run that."""
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_brings_little_but_itself():
    """Importing it takes at most half as long again as asyncio and orjson, and what it brings along decides that.

    How long that is depends on the machine and on what else it does; the row ``import`` of the benchmarks measures it.
    """
    needed = {"__future__", "bisect", "random", "typing", "zlib"}  # up to 3.13 asyncio brings typing
    brought = modules_after("import cagey_sessions") - modules_after("import asyncio, orjson")
    others = {name for name in brought if name.split(".")[0] != "cagey_sessions" and not name.startswith("_")}
    assert others - {"cython_runtime"} <= needed
    assert "cagey_sessions.sessions.manager" in brought


def test_every_python_that_is_named_gets_wheels_and_is_tested():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = re.findall(r"Python :: (3\.\d+)$", "\n".join(settings["project"]["classifiers"]), re.MULTILINE)
    assert len(named) > 3
    assert settings["tool"]["cibuildwheel"]["build"] == [f"cp{version.replace('.', '')}-*" for version in named]
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if workflow.parent.exists():  # not in an sdist
        matrix = ", ".join(f'"{version}"' for version in named)
        assert f"python: [{matrix}]" in workflow.read_text(encoding="utf-8")


def test_importing_the_package_imports_no_extra():
    script = (
        "import sys, cagey_sessions, cagey_sessions.tools.cli, cagey_sessions.tools.store, cagey_sessions.stores.urls\n"
        "extras = {'uvloop', 'websockets', 'rich', 'pytest', 'hypothesis', 'Cython', 'setuptools', 'sqlite3'}\n"
        "extras |= {'asyncpg', 'redis', 'hiredis', 'msgspec'}\n"
        "print(sorted(extras & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
