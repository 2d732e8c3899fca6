"""The directions in which the parts may depend on each other."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = {"bq_kernels": ROOT / "kernels", "bq_calibration": ROOT / "calibration", "bq_vllm": ROOT}
OURS = {*PARTS, "benchmarks", "kernels", "calibration", "tests", "vllm"}
MAY_IMPORT = {"bq_kernels": {"torch", "triton"}, "bq_vllm": {"bq_kernels", "vllm", "torch"}}


def imports(part: str) -> dict[str, set[str]]:
    """Top-level names that every file of a part imports, wherever in the file."""
    found = {}
    for path in sorted((PARTS[part] / part).rglob("*.py")):
        names = found.setdefault(str(path.relative_to(ROOT)), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    assert found, f"no files in {part}"
    return found


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_part_imports_only_what_it_may(part):
    for path, names in imports(part).items():
        assert names <= MAY_IMPORT[part] | {part} | sys.stdlib_module_names, path


def test_calibration_imports_of_ours_only_the_kernels():
    for path, names in imports("bq_calibration").items():
        assert names & OURS <= {"bq_kernels", "bq_calibration"}, path


@pytest.mark.parametrize("folder", ["kernels", "calibration", "benchmarks"])
def test_no_package_shadows_others(folder):
    # with one, `import kernels` would find ours, and not the package of that name that transformers uses
    assert not (ROOT / folder / "__init__.py").exists()


# ---- a house that stays in order

MOST_FUNCTION_LINES, MOST_MODULE_LINES = 80, 350
SHIPPED = [path for part, root in PARTS.items() for path in sorted((root / part).rglob("*.py"))]
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*SHIPPED, *BENCHMARKS], ids=name_of)
def test_modules_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= MOST_FUNCTION_LINES, node.name


def imported_modules(path: Path, part: str) -> set[str]:
    """Modules of its own part that a file imports, wherever in the file, as dotted names; not those for types alone."""
    here = path.relative_to(PARTS[part]).with_suffix("").parts
    tree = ast.parse(path.read_text())
    for_types = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in for_types:
            base = (*here[: len(here) - node.level],) if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            if module.split(".")[0] == part:
                found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("part", PARTS)
def test_no_import_circles(part):
    files = {path for path in SHIPPED if path.is_relative_to(PARTS[part] / part)}
    dotted = {".".join(path.relative_to(PARTS[part]).with_suffix("").parts): path for path in files}
    dotted = {name.removesuffix(".__init__"): path for name, path in dotted.items()}
    # the package itself stands for what its __init__ offers lazily, and every module belongs to it
    graph = {name: (imported_modules(path, part) & set(dotted)) - {name, part} for name, path in dotted.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


ONE_PLACE = {  # what is written: the files that may say it
    r"register_forward_pre_hook": {"calibration/bq_calibration/block.py"},  # statistics of inputs
    r"(2 ?\*\* ?|1 << )(\w+\.)?bits\)? - 1": {
        "kernels/bq_kernels/format.py"
    },  # the largest code and the middle of the codes
    r"1_000_003": {"calibration/bq_calibration/sampling.py"},  # seeds
    r"\[:: ?max\(1, ": set(),  # a spread of rows
    r"\(2, 3, 4\)": {"kernels/bq_kernels/format.py"},  # bits
    r"(module|block|layer)\(hidden\b[^)]*\*\*": {"calibration/bq_calibration/block.py"},  # a decoder layer's forward
}


@pytest.mark.parametrize("pattern", ONE_PLACE)
def test_one_place_each(pattern):
    saying = {name_of(path) for path in (*SHIPPED, *BENCHMARKS) if re.search(pattern, path.read_text())}
    assert saying == ONE_PLACE[pattern]


HOMEMADE = {"Turn", "Problem", "Case", "_Product", "hold", "back", "MARGIN", "_touch", "early_launch", "spent", "home"}


@pytest.mark.parametrize("path", [*SHIPPED, *BENCHMARKS], ids=name_of)
def test_names_are_those_of_the_field(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    assert not names & HOMEMADE
    assert not [name for name in names if re.search(r"[A-Z]_AN?_[A-Z]", name)]


UNITS = "bits?|bytes|tokens|nats|steps|words|programs|scales?|windows|samples|seconds|angles|rows|instructions"
WHOLES = "weight|group|step|token|sequence|sample|row|block|layer|program|window|second|word|feature|unit|launch"


@pytest.mark.parametrize("path", [*SHIPPED, *BENCHMARKS, *PROSE], ids=name_of)
def test_prose_says_per(path):
    text = " ".join(path.read_text().split())
    assert not re.findall(rf"\b(?:{UNITS}) an? (?:{WHOLES})\b", text)
