"""What the tests of the repository share: its folders, notebooks, and the order of its packages."""

import re
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "steer_nb"

# A module imports from packages before its own in this list, and in its own package from notebooks
# with a lower number.
PACKAGES = [
    "core",
    "theory",
    "convert",
    "data",
    "testing",
    "training",
    "methods",
    "evaluation",
    "integrations",
    "visual",
    "experiments",
    "cli",
]
LONGEST_MODULE = 350  # lines, as exported and formatted
LONGER_MODULES: dict[str, str] = {}  # module -> the reason why it may be longer

settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
PROJECT = settings["DEFAULT"]


def visible(path: Path) -> bool:
    "Whether a file belongs to the repository and not to a cache."
    return not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)


NOTEBOOKS = [path for path in sorted(NBS.rglob("*.ipynb")) if visible(path)]


def read(notebook: Path) -> nbformat.NotebookNode:
    "A notebook."
    return nbformat.read(notebook, as_version=4)


def exported_module(notebook: nbformat.NotebookNode) -> str | None:
    "The module that a notebook writes, such as 'core.sites'; None if it writes none."
    for cell in notebook.cells:
        found = re.search(r"^#\|\s*default_exp\s+([\w.]+)", cell.source, re.MULTILINE)
        if cell.cell_type == "code" and found:
            return found[1]
    return None


MODULES = {
    module: path for path in NOTEBOOKS if (module := exported_module(read(path))) is not None
}


def module_path(module: str) -> Path:
    "The file of a module: 'core.sites' -> steer_nb/core/sites.py."
    return LIB.joinpath(*module.split(".")).with_suffix(".py")


def position(module: str) -> tuple[int, int]:
    "Where a module stands in the order of imports: its package, then its notebook's number."
    return PACKAGES.index(module.split(".")[0]), int(MODULES[module].name.split("_")[0])
