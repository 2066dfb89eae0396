"""The structure of the house, held by walking it: which way imports go, and that the two halves of the contract agree."""

import ast
import re
from pathlib import Path

import pytest

from sarathi_kernels import plan as _  # noqa: F401  (the package must import before its sources are read)
from sarathi_kernels.plan import MERGE_ITEM_FIELDS, WORK_ITEM_FIELDS

ROOT = Path(__file__).parent.parent

# folder -> top-level packages of ours that it may import
PACKAGES = {
    "sarathi_kernels": {"sarathi_kernels"},
    "engine": {"engine", "sarathi_kernels"},
    "bench": {"bench", "engine", "sarathi_kernels"},
}
OURS = {"sarathi_kernels", "engine", "bench", "tests"}


def imports(path):
    """Dotted names imported anywhere in the file, function bodies included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(folder):
    return sorted(p for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", PACKAGES)
def test_packages_import_only_downwards(folder):
    assert sources(folder)
    for path in sources(folder):
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in OURS or top in PACKAGES[folder], f"{path.relative_to(ROOT)} imports {name}"


def test_backends_know_the_spec_and_not_each_other():
    """A backend is made of backends/NAME.py and backends/NAME_*.py; beside itself it sees the contract and the plan's columns."""
    folder = ROOT / "sarathi_kernels" / "backends"
    shared = {"", "AppendKvCall", "AttentionCall", "PlanConfig", "Problem"}
    for path in folder.glob("*.py"):
        if path.stem == "__init__":
            continue
        family = path.stem.split("_")[0]
        for name in imports(path):
            if name.startswith("sarathi_kernels.backends"):
                tail = name.removeprefix("sarathi_kernels.backends").lstrip(".").split(".")[0]
                assert tail in shared or tail.split("_")[0] == family, f"{path.name} imports {name}"
            elif name.startswith("sarathi_kernels."):
                module = name.split(".")[1]
                assert module in ("spec", "plan", "_native", "_cuda"), f"{path.name} imports {name}"


def test_policies_are_pure():
    """A policy sees requests and nothing else of the engine: no model, no scheduler, no torch."""
    for path in (ROOT / "engine" / "policies").glob("*.py"):
        for name in imports(path):
            allowed = name.startswith(("engine.policies", "engine.request", "sarathi_kernels")) or name.split(".")[0] not in OURS | {"torch"}
            assert allowed, f"{path.name} imports {name}"


def test_no_phase_flag():
    """A decode is a row count of one. Neither the kernels nor the engine ask which phase a request is in."""
    for folder in ("sarathi_kernels", "engine"):
        for path in sources(folder):
            names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
            assert not {n for n in names if re.fullmatch(r"is_(prefill|decode)\w*|phase", n)}, path


@pytest.mark.parametrize("struct, fields", [("WorkItem", WORK_ITEM_FIELDS), ("MergeItem", MERGE_ITEM_FIELDS)])
def test_tables_have_the_columns_of_params_h(struct, fields):
    text = (ROOT / "csrc" / "params.h").read_text()
    body = re.search(rf"struct {struct} \{{(.*?)\n\}};", text, re.S).group(1)
    assert tuple(re.findall(r"^\s*int32_t (\w+);", body, re.M)) == fields


def test_cmake_lists_every_native_source():
    listed = (ROOT / "CMakeLists.txt").read_text()
    for path in [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]:
        assert path.name in listed, f"CMakeLists.txt does not build {path.relative_to(ROOT)}"
