"""The house: which folder may import which, and how much stands in the hall."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import curvlinops_diffusion
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS

ROOT = Path(curvlinops_diffusion.__file__).parent
PACKAGE = "curvlinops_diffusion"

# each folder may import itself and those named
MAY_IMPORT = {
    "runtime": set(),
    "linalg": {"runtime"},
    "linalg/solvers": {"runtime", "linalg"},
    "diffusion": {"runtime", "linalg"},
    "layers": {"runtime", "linalg", "diffusion"},
    "curvature": {"runtime", "linalg", "diffusion", "layers"},
    "influence": {"runtime", "linalg", "linalg/solvers", "diffusion", "layers"},
    "influence/measurements": {"runtime", "linalg", "diffusion", "layers"},
    "influence/validation": {"runtime", "linalg", "diffusion", "layers", "influence"},
    "loading": {"runtime", "linalg", "diffusion"},
    "page": {"runtime", "linalg", "diffusion", "influence"},
    "cli": {
        "runtime",
        "linalg",
        "diffusion",
        "layers",
        "curvature",
        "influence",
        "loading",
        "page",
    },
}
# a folder within another is a room of its own where the other may import it, but not the reverse
MAY_IMPORT["influence"] |= {"influence/measurements"}
MAY_IMPORT["influence/validation"] |= {"influence/measurements"}
MAY_IMPORT["page"] |= {"influence/measurements"}
MAY_IMPORT["cli"] |= {"loading", "page"}
MAY_IMPORT["cli"] |= {"influence/measurements", "influence/validation"}
FILES = sorted(ROOT.rglob("*.py"))
# the files that import what a string names
BY_NAME = {
    "measurements": ROOT / "influence" / "measurements" / "registry.py",
    "commands": ROOT / "cli" / "program.py",
}


def room_of(parts: tuple[str, ...]) -> str:
    """The folder that a module belongs to, by its path within the package."""
    inner = "/".join(parts[:2])
    return inner if inner in MAY_IMPORT else parts[0]


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The modules of the package that a file imports anywhere, as paths within the package."""
    if path == BY_NAME["measurements"]:
        for entry in MEASUREMENTS.values():
            yield ("influence", "measurements", entry.where.split(":")[0])
    if path == BY_NAME["commands"]:
        for command in sorted((ROOT / "cli" / "commands").glob("[!_]*.py")):
            yield ("cli", "commands", command.stem)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found = [node.module or ""]
            if node.module == PACKAGE:
                found = [f"{PACKAGE}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        for name in found:
            first, *rest = name.split(".")
            if first == PACKAGE and rest:
                yield tuple(rest)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_folders_import_only_those_above_them(path):
    own = path.relative_to(ROOT).parts
    if len(own) == 1:  # the package's root, and the program's start
        return
    room = room_of(own)
    for parts in imports(path):
        there = room_of(parts)
        assert there == room or there in MAY_IMPORT[room], (
            f"{'/'.join(own)} imports {'.'.join(parts)}: {room}/ may import only "
            f"{', '.join(sorted(MAY_IMPORT[room])) or 'nothing else of the package'}."
        )


def test_there_are_no_circles():
    """Between folders and between files."""
    graph = {}
    for path in FILES:
        own = path.relative_to(ROOT).with_suffix("").parts
        for parts in imports(path):
            # a name of a package's ``__init__``, or of a module
            file = ROOT.joinpath(*parts).with_suffix(".py")
            target = parts if file.exists() else (*parts, "__init__")
            if ROOT.joinpath(*target).with_suffix(".py").exists():
                graph.setdefault(own, set()).add(target)
    done, on_the_way = set(), []

    def visit(node):
        assert node not in on_the_way, f"a circle: {on_the_way[on_the_way.index(node) :]}"
        if node in done:
            return
        on_the_way.append(node)
        for following in sorted(graph.get(node, ())):
            visit(following)
        on_the_way.pop()
        done.add(node)

    for node in sorted(graph):
        visit(node)
    assert len(graph) > 50, "hardly any imports were found: the test sees nothing"


def test_few_files_import_by_name():
    """What a string names, :func:`imports` must be told of."""
    using = {path for path in FILES if "import_module" in path.read_text()}
    assert using == set(BY_NAME.values())


def test_the_root_holds_few_entries():
    """The folders, the door, and the modules of public names."""
    entries = [path.name for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 20, sorted(entries)


def test_tests_mirror_the_folders():
    """Each folder of the package has one of tests; files of tests are in one or span the chain."""
    tests = Path(__file__).parent
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert folders == {path.name for path in tests.iterdir() if (path / "__init__.py").exists()}
    for folder in folders:
        assert list((tests / folder).glob("test_*.py")), f"{folder}/ has no tests"


# names of curvlinops' operators that are not public
INSIDES = {"_in_shape", "_out_shape", "_in_shape_flat", "_matmat", "_adjoint", "SELF_ADJOINT"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_border_to_curvlinops_is_one_file(path):
    """Its next version changes its insides; only ``linalg/upstream.py`` may know them."""
    if path == ROOT / "linalg" / "upstream.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        named = {
            ast.Attribute: lambda n: n.attr,
            ast.FunctionDef: lambda n: n.name,
            ast.Name: lambda n: n.id,
        }.get(type(node), lambda n: None)(node)
        assert named not in INSIDES, f"{path} touches {named}"
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "curvlinops", f"{path} imports curvlinops"
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "curvlinops" for alias in node.names), path
