"""The directions in which the parts may depend on each other."""

import ast
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
