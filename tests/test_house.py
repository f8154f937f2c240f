"""The architecture that docs/design.md describes, as properties of the files and their imports."""

import ast
import collections
import functools
import graphlib
import itertools
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "jax_ddpm"

# From bottom to top. Rooms of a floor do not import each other.
FLOORS = (
    ("errors",),
    ("keys", "options"),
    ("runtime",),
    ("images",),
    ("diffusion", "models", "data"),
    ("codecs", "conditions"),
    ("factory",),
    ("tasks",),
    ("generate", "config"),
    ("runs",),
    ("training",),
    ("inference",),
    ("interop",),
    ("evaluation",),
    ("api",),
    ("cli",),
    ("main",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def module(path):
    """The dotted name below jax_ddpm; of the package itself, whose doors lead to the api, "api"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "api"


MODULES = {module(path): path for path in FILES if path != PACKAGE / "__init__.py"}


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


@functools.cache
def imports(path):
    """The modules of the package that a file imports, also inside its functions."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: say the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, inner = name.partition(".")
            if package == "jax_ddpm":
                # What is no module itself is something in one.
                found |= {inner if inner in MODULES else inner.rpartition(".")[0]} & {*MODULES}
    return found


def room(name):
    return name.partition(".")[0]


def test_no_import_runs_upwards():
    """No import runs sideways either, so there are no circles among rooms."""
    edges = [(module(path), imported) for path in FILES for imported in imports(path)]
    across = [edge for edge in edges if room(edge[0]) != room(edge[1])]
    assert [edge for edge in across if FLOOR[room(edge[0])] <= FLOOR[room(edge[1])]] == []


def test_no_circle_among_files():
    graphlib.TopologicalSorter({name: imports(path) for name, path in MODULES.items()}).prepare()


def test_every_room_has_its_floor():
    assert {*map(room, MODULES)} == FLOOR.keys()


def test_only_diffusion_draws_noise_and_asks_what_process_it_is():
    """Initial parameters are drawn by networks."""
    inside = {"Chain", "ContinuousProcess", "per_example_normal", "q_sample"}
    found = []
    for name, path in MODULES.items():
        if room(name) in ("diffusion", "models"):
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom):
                found += [(name, alias.name) for alias in node.names if alias.name in inside]
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "jax.random.normal":
                found.append((name, "jax.random.normal"))
    assert found == []


def repeated(names):
    return [name for name, count in collections.Counter(names).items() if count > 1]


def test_no_two_modules_of_one_name():
    """A room's table is the same thing in each."""
    assert repeated(path.stem for path in FILES if path.stem not in ("__init__", "table")) == []


def test_no_two_public_classes_of_one_name():
    classes = itertools.chain.from_iterable(parsed(path).body for path in FILES)
    names = [node.name for node in classes if isinstance(node, ast.ClassDef)]
    assert repeated(name for name in names if not name.startswith("_")) == []


def test_few_files_lie_loose():
    assert len([path for path in PACKAGE.glob("*.py") if path.stem != "__init__"]) <= 9


def test_every_room_is_documented():
    page = (ROOT / "docs" / "design.md").read_text()
    assert [room for room in FLOOR if not re.search(rf"\b{room}(/|\.py\b)", page)] == []
