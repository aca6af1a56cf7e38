"""The package follows its plan: a notebook for each module, imports downwards, short modules, no
private names of other modules."""

import ast
import os
import re
import subprocess
import sys

import pytest
from repository import (
    LIB,
    LONGER_MODULES,
    LONGEST_MODULE,
    MODULES,
    NBS,
    PACKAGES,
    ROOT,
    module_path,
    position,
)

import steer_nb

BY_HAND = {"__init__.py", "__main__.py", "_modidx.py"}


def test_every_module_has_a_notebook_of_its_folder_and_name():
    assert {module.split(".")[0] for module in MODULES} <= set(PACKAGES)
    for module, notebook in MODULES.items():
        package, name = module.split(".")
        assert notebook.parent == NBS / package and notebook.stem[3:] == name, module
    files = {path for path in LIB.rglob("*.py") if path.name not in BY_HAND}
    assert files == {module_path(module) for module in MODULES}


def test_contributing_lists_every_module_in_order_with_its_first_line():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ordered = sorted(MODULES, key=position)
    expected = []
    for module in ordered:
        tree = ast.parse(module_path(module).read_text(encoding="utf-8"))
        expected.append((module, ast.get_docstring(tree).rstrip(".").lower()))
    found = re.findall(r"^\| `(\w+\.\w+)` \| (.+) \|$", page, re.MULTILINE)
    assert [(module, line.lower()) for module, line in found] == expected
    packages = re.findall(r"^\| `(\w+)` \| .+ \|$", page, re.MULTILINE)
    assert packages == list(dict.fromkeys(module.split(".")[0] for module in ordered))


def test_no_two_notebooks_of_a_package_have_the_same_number():
    assert len({position(module) for module in MODULES}) == len(MODULES)


def own_imports(source: str, module: str) -> list[tuple[str, str]]:
    "What a module imports of steer_nb, wherever in it: (module, name)."
    package, found = module.split(".")[0], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "steer_nb":
                    found.append((alias.name.removeprefix("steer_nb").lstrip("."), ""))
        if isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level == 1:
                origin = f"{package}.{origin}".rstrip(".")
            elif node.level == 0 and origin.split(".")[0] != "steer_nb":
                continue
            origin = origin.removeprefix("steer_nb").lstrip(".")
            for alias in node.names:  # a module, or a name of one
                inner = f"{origin}.{alias.name}"
                found.append((inner, "") if inner in MODULES else (origin, alias.name))
    return found


def upward_imports(source: str, module: str) -> list[str]:
    "The imports of a module that do not go down the list."
    return [
        other
        for other, name in own_imports(source, module)
        if name != "__version__" and (other not in MODULES or position(other) >= position(module))
    ]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_list(module):
    assert upward_imports(module_path(module).read_text(encoding="utf-8"), module) == []


def private_names(source: str, module: str) -> list[str]:
    "Private names of other modules that a module imports."
    return [
        f"{other}.{name}"
        for other, name in own_imports(source, module)
        if name.startswith("_") and not name.startswith("__")
    ]


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_of_another_module(module):
    assert private_names(module_path(module).read_text(encoding="utf-8"), module) == []


def test_what_the_two_tests_look_for_is_found():
    lines = [
        "from ..training.fit import fit",
        "from .sites import blocks",
        "import steer_nb.core.hooks",
        "from steer_nb import steer",
        "def f(): from .sites import _parts",
    ]
    source = "\n".join(lines)
    assert upward_imports(source, "core.hooks") == ["training.fit", "core.hooks", ""]
    assert private_names(source, "core.hooks") == ["core.sites._parts"]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short(module):
    lines = len(module_path(module).read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_MODULE or module in LONGER_MODULES, lines


# What an import loads


NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("an import opened a connection")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def in_new_interpreter(code: str, **environment: str) -> None:
    "Run the code in an interpreter that has imported nothing, without a network."
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module, forbidden",
    [
        ("steer_nb", {"torch", "transformers", "numpy"}),
        ("steer_nb.cli.cli", {"torch", "transformers", "numpy", "pandas", "scipy", "peft"}),
        ("steer_nb.core.sites", {"accelerate", "datasets", "peft", "matplotlib", "pandas"}),
        ("steer_nb.core.loading", {"accelerate", "datasets", "peft", "matplotlib", "pandas"}),
        ("steer_nb.visual.plots", {"torch", "transformers", "accelerate", "datasets", "peft"}),
        ("steer_nb.training.config", {"transformers", "accelerate", "datasets"}),
        ("steer_nb.training.fit", {"peft", "matplotlib", "datasets", "pandas"}),
        ("steer_nb.data.tasks", {"datasets", "pandas"}),
        ("steer_nb.experiments.grid", {"ray"}),
        ("steer_nb.integrations.lm_eval_tasks", {"lm_eval"}),
    ],
)
def test_an_import_loads_only_what_it_needs(module, forbidden):
    in_new_interpreter(
        f"import {module}\nloaded = {forbidden} & set(sys.modules)\nassert not loaded, loaded"
    )


def test_the_help_loads_neither_torch_nor_tables():
    in_new_interpreter(
        "from steer_nb.cli.cli import main\n"
        "sys.argv = ['steer_nb', 'train', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "loaded = {'torch', 'transformers', 'numpy', 'pandas', 'peft'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )


def test_every_module_imports_without_network_and_gpu():
    in_new_interpreter(
        "".join(f"import steer_nb.{module}\n" for module in MODULES)
        + "import torch\nassert not torch.cuda.is_initialized()",
        CUDA_VISIBLE_DEVICES="",
        HF_HUB_OFFLINE="0",
    )


def test_the_package_gives_every_name_it_promises():
    for name in steer_nb.__all__:
        value = getattr(steer_nb, name)
        assert value is not None and type(value).__name__ != "module", name
    assert callable(steer_nb.evaluate) and callable(steer_nb.joint)
    with pytest.raises(AttributeError, match="no attribute 'stear'"):
        steer_nb.stear  # noqa: B018  (the attribute is what is tested)
