"""No import runs upwards: scripts -> study, evaluation, prepare -> train -> data -> mathematics."""

import ast

from tests.conftest import ROOT

RING = {"data": 1, "train": 2, "evaluation": 3, "prepare": 3, "study": 4}  # mathematics: 0
COMMANDS = {"store", "search", "report", "__main__", "__init__"}
# Imported when called: load_published is the model's by contract, demo data are made if needed.
LATE = {("model", "prepare.published"), ("train.inputs", "prepare.demo")}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mcn_ext"):
            for alias in node.names:
                yield f"{node.module}.{alias.name}".removeprefix("mcn_ext").lstrip(".")


def test_no_import_runs_upwards():
    package = ROOT / "mcn_ext"
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        if name in COMMANDS:
            continue
        ring = RING.get(name.split(".")[0], 0)
        for target in imports(ast.parse(path.read_text())):
            if any(name == a and target.startswith(b) for a, b in LATE):
                continue
            first = target.split(".")[0]
            assert first not in COMMANDS and RING.get(first, 0) <= ring, f"{name} -> {target}"
