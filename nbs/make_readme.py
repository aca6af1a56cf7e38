"""Write README.md from index.ipynb, so that what the front page shows has been run.

Cells marked `#| hide` are left out, of cells marked `#| echo: false` only the output is shown, and
nbdev's other directives are stripped. Printed text becomes a fenced block, figures become files in
nbs/images/. Links are relative to nbs/ in the notebook, and to the repository in the README.
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
{% block input_group %}{% if not cell.metadata.output_only %}{{ super() }}{% endif %}{% endblock %}
{% block stream %}{{ fenced(output.text) }}{% endblock stream %}
{% block data_text scoped %}{{ fenced(output.data['text/plain']) }}{% endblock data_text %}
"""
# Of an output, the first of these is shown.
SHOWN = ["text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]


def directives(source: str) -> set[str]:
    "The names of a cell's nbdev directives: `{'hide'}` for `#| hide`."
    return set(re.findall(r"^#\|[ \t]*(\w+)", source, re.MULTILINE))


def from_the_top(source: str) -> str:
    "The text with links to files of ours relative to the repository; other links are unchanged."

    def link(match):
        before, target, after = match.groups()
        path = posixpath.normpath(posixpath.join(NBS.name, target))
        return f"{before}{path}{after}" if (ROOT / path).exists() else match[0]

    text = re.sub(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))", link, source)
    return re.sub(r'(\bsrc(?:set)?=")([^"]+)(")', link, text)


def compact(text: str) -> str:
    "The text with the cells of tables not padded."

    def row(match):
        if set(match[0]) <= {"|", "-"}:
            return re.sub(r"-+", "---", match[0])
        return re.sub(r"\| +", "| ", re.sub(r" +\|", " |", match[0]))

    return re.sub(r"^\|.*\|$", row, text, flags=re.MULTILINE)


def front_page(notebook: Path) -> nbformat.NotebookNode:
    "The notebook with the cells that the README shows."
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
            cell.metadata["output_only"] = "echo" in directives(cell.source)
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip()
    return page


def readme(notebook: Path = NBS / "index.ipynb") -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and its figures: path from the top of the repository -> bytes."
    config = Config({"NbConvertBase": {"display_data_priority": SHOWN}})
    exporter = MarkdownExporter(config=config, raw_template=TEMPLATE)
    text, resources = exporter.from_notebook_node(
        front_page(notebook), {"unique_key": notebook.stem, "output_files_dir": IMAGES}
    )
    text = re.sub(r"\n([ \t]*\n){2,}", "\n\n", text).strip()  # the template leaves empty lines
    return f"{HEADER}{compact(text)}\n", resources["outputs"]


def main() -> None:
    "Write README.md and its figures, and delete the figures of an earlier version."
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
