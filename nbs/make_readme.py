"""Write README.md from index.ipynb: the front page is a notebook too, so what it shows has been run.

Cells marked `#| hide` are left out, nbdev's other directives are stripped, text that code printed becomes a fenced block, and
figures become files in nbs/images/. Links are written in the notebook as seen from nbs/, and in the README as seen from the top.
"""

import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

NBS = Path(__file__).parent
ROOT = NBS.parent
IMAGES = "nbs/images"
HEADER = "<!-- made from nbs/index.ipynb by `make readme`: edit the notebook, not this file -->\n\n"
TEMPLATE = """{% extends 'markdown/index.md.j2' %}
{% macro fenced(text) %}

```
{{ text | strip_ansi | trim }}
```
{% endmacro %}
{% block stream %}{{ fenced(output.text) }}{% endblock stream %}
{% block data_text scoped %}{{ fenced(output.data['text/plain']) }}{% endblock data_text %}
"""
SHOWN = [
    "text/markdown",
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/plain",
]  # the first that an output has


def directives(source: str) -> set[str]:
    "The names of a cell's nbdev directives: `{'hide'}` for `#| hide`."
    return set(re.findall(r"^#\|[ \t]*(\w+)", source, re.MULTILINE))


def from_the_top(source: str) -> str:
    "The text with its relative links as seen from the top of the repository; what is no file of ours stays as it is."

    def link(match):
        path = posixpath.normpath(posixpath.join(NBS.name, match[1]))
        return f"]({path}{match[2] or ''})" if (ROOT / path).exists() else match[0]

    return re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", link, source)


def front_page(notebook: Path) -> nbformat.NotebookNode:
    "The notebook as the README shows it."
    page = nbformat.read(notebook, as_version=4)
    page.metadata["language_info"] = {"name": "python"}  # the fences of code cells say so
    page.cells = [
        cell
        for cell in page.cells
        if cell.cell_type != "raw" and "hide" not in directives(cell.source)
    ]
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = from_the_top(cell.source)
        else:
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip()
    return page


def readme(notebook: Path = NBS / "index.ipynb") -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and its figures: path from the top of the repository -> bytes."
    config = Config({"NbConvertBase": {"display_data_priority": SHOWN}})
    exporter = MarkdownExporter(config=config, raw_template=TEMPLATE)
    text, resources = exporter.from_notebook_node(
        front_page(notebook), {"unique_key": notebook.stem, "output_files_dir": IMAGES}
    )
    text = re.sub(
        r"\n([ \t]*\n){2,}", "\n\n", text
    ).strip()  # the template leaves runs of empty lines
    return f"{HEADER}{text}\n", resources["outputs"]


def main() -> None:
    "Write README.md and its figures; figures that it no longer shows are deleted."
    text, figures = readme()
    for old in (ROOT / IMAGES).glob("index_*"):
        old.unlink()
    for path, content in figures.items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_bytes(content)
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    print(f"README.md: {len(text.splitlines())} lines, figures: {len(figures)}")


if __name__ == "__main__":
    main()
