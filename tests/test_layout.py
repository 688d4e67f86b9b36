"""The layout that CONTRIBUTING.md describes: which package may import which, no import cycle, who may use what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
FILES = sorted((CHECKOUT / "ldmscale").rglob("*.py"))
WITH_OWN_ROWS = ("data", "train/engine", "config/schema")  # packages in packages that have rows of their own


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


def package_of(module: str) -> str:
    """The row of the table that a module belongs to."""
    parts = module.split(".")[1:]
    inner = "/".join(parts[:2])
    if inner.startswith(WITH_OWN_ROWS) and (CHECKOUT / "ldmscale" / inner).is_dir():
        return inner
    return parts[0] if parts else "ldmscale"


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{file}:{node.lineno}: relative import"
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in MODULES else node.module


def table() -> dict[str, set[str]]:
    """The table of CONTRIBUTING.md: package, and the packages that it may import."""
    rows = re.findall(r"^\| `([\w/]+)` \| (.*) \|$", (CHECKOUT / "CONTRIBUTING.md").read_text(), re.M)
    return {package: set(re.findall(r"`([\w/]+)`", allowed)) for package, allowed in rows}


def edges() -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for module, file in MODULES.items():
        for imported in imports(file):
            if imported.split(".")[0] == "ldmscale" and package_of(imported) != package_of(module):
                found.setdefault((package_of(module), package_of(imported)), []).append(
                    f"{module} -> {imported}"
                )
    return found


def test_every_import_between_packages_is_in_the_table_and_every_entry_is_used() -> None:
    allowed = {(package, other) for package, others in table().items() for other in others}
    found = edges()
    assert not {pair: found[pair] for pair in found.keys() - allowed}
    assert not allowed - found.keys(), "entries of the table that no import needs"
    assert {package_of(module) for module in MODULES} <= table().keys()


def test_packages_import_in_one_direction() -> None:
    list(TopologicalSorter(table()).static_order())  # raises CycleError and names the cycle


def test_modules_import_in_one_direction() -> None:
    graph = {module: {name for name in imports(file) if name in MODULES} for module, file in MODULES.items()}
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("deepspeed", ["ldmscale/train/engine/"]),
        ("wandb", ["ldmscale/tracking/", "ldmscale/jobs/wandb_sync.py"]),
        ("xformers", ["ldmscale/models/attention.py"]),
        ("hydra", ["ldmscale/config/", "ldmscale/cli.py"]),
        ("fsspec", ["ldmscale/storage/"]),
    ],
)
def test_a_library_is_imported_by_its_package_alone(library: str, homes: list[str]) -> None:
    users = [
        str(file.relative_to(CHECKOUT))
        for file in FILES
        if any(name.split(".")[0] == library for name in imports(file))
    ]
    assert users
    assert [user for user in users if not user.startswith(tuple(homes))] == []


def test_only_storage_renames_links_and_locks_files() -> None:
    calls = re.compile(r"\bos\.(replace|link|rename)\(|\.(rename|hardlink_to)\(|\bfcntl\b")
    users = {str(file.relative_to(CHECKOUT)) for file in FILES if calls.search(file.read_text())}
    assert users and {user for user in users if not user.startswith("ldmscale/storage/")} == set()


def test_private_state_of_deepspeed_is_used_in_one_file() -> None:
    """Its names, as attributes, strings for getattr, or in comments."""
    names = (
        r"_is_gradient_accumulation_boundary|micro_steps|global_steps|global_samples|averaged_gradients|all_grad_tensors|"
        r"fp(16|32)_(partitioned_)?groups\w*|single_partition_of_fp32_groups|_hp_mapping|hp_fragment_address|ds_(tensor|shape|"
        r"numel|id|status|persist)|partition_numel|_get_param_partition_rank|_reassign_or_swap_out_partitioned_parameters|"
        r"checkpoint_event_(pro|epi)logue|empty_partition_cache|update_lp_params|ipg_buckets|__compatible_ops__"
    )
    private = re.compile(rf"\b({names})\b")
    users = {str(file.relative_to(CHECKOUT)) for file in FILES if private.search(file.read_text())}
    assert users == {"ldmscale/train/engine/deepspeed_internals.py"}


def test_no_name_that_begins_with_an_underscore_is_imported() -> None:
    private = [
        f"{module} imports {name.name} of {node.module}"
        for module, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldmscale")
        for name in node.names
        if name.name.startswith("_") and not name.name.startswith("__")
    ]
    assert private == []


@pytest.mark.parametrize(
    "modules",
    [
        "cli, config, launcher, errors, storage, config.checks, config.load, config.resume, checkpoint.run_folder"
    ],
)
def test_what_a_login_node_runs_imports_no_torch(modules: str) -> None:
    names = ", ".join(f"ldmscale.{name}" for name in modules.split(", "))
    program = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_have_one_subject_each() -> None:
    """Files are short enough to be read at once and long enough to be worth opening (CONTRIBUTING, "Code")."""
    lines = {
        str(file.relative_to(CHECKOUT)): file.read_text().count("\n")
        for file in FILES
        if file.name not in ("__init__.py", "__main__.py")
    }
    assert not {name: count for name, count in lines.items() if count > 420}
    assert len(lines) <= 240
    assert sorted(lines.values())[len(lines) // 2] >= 130
