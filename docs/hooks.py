"""Hooks of MkDocs: the notebooks become pages of Markdown, and the modules a reference.

MkDocs then checks every link, makes the index for the search, and writes the pages. Formulas become
MathML, so that the site loads nothing from elsewhere.
"""

import html
import posixpath
import re
import sys
from functools import cache
from pathlib import Path

import nbformat
from latex2mathml.converter import convert as to_mathml
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
sys.path[:0] = [str(NBS), str(ROOT / "tests")]
from make_readme import directives  # noqa: E402
from repository import MODULES, PACKAGES, PROJECT  # noqa: E402

REPOSITORY = PROJECT["git_url"]
COLAB = f"https://colab.research.google.com/github/{PROJECT['user']}/{PROJECT['repo']}/blob/main/"
MODULE_OF = {path: module for module, path in MODULES.items()}
SUBJECTS = {  # of the reference: packages
    "Steer": ["core"],
    "Theory": ["theory"],
    "Convert": ["convert"],
    "Models and data": ["data", "testing"],
    "Train and evaluate": ["training", "methods", "evaluation"],
    "Other tools": ["integrations"],
    "Look": ["visual"],
    "Reproduce": ["experiments", "cli"],
}


@cache
def notebooks() -> list[Path]:
    "The notebooks of the site, in the order of their folders and names."
    found = [path for path in NBS.glob("*/*.ipynb") if ".ipynb_checkpoints" not in path.parts]
    return sorted(found, key=lambda path: (path.parent, path.stem != "verdicts", path.name))


@cache
def described(path: Path) -> tuple[str, str]:
    "The title of a notebook, and the quote below it."
    first = nbformat.read(path, as_version=4).cells[0].source
    title = re.search(r"^# (.+)$", first, re.MULTILINE)[1]
    quote = re.search(r"^> (.+)$", first, re.MULTILINE)
    return title, quote[1] if quote else ""


def linked(text: str, folder: str) -> str:
    "Markdown with its links to files of the repository as links of the site, or to the repository."

    def link(match):
        target, anchor = match[1], (match[2] or "").lower()  # Jupyter's anchors have capitals
        if not target:
            return f"]({anchor})"
        if re.match(r"\w+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join("nbs", folder, target))
        inside = posixpath.relpath(path, "nbs")
        if path == "README.md":
            return f"]({posixpath.relpath('index.md', folder or '.')}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # `a[b](c)` in code
        if path.startswith("nbs/") and inside.endswith(".ipynb"):
            inside = inside.removesuffix(".ipynb") + ".md"
        elif path.startswith("nbs/") and (NBS / inside).is_dir():
            inside = f"{inside}/index.md"
        elif not path.startswith("nbs/") or inside.startswith("store/"):
            return f"]({REPOSITORY}/blob/main/{path}{anchor})"
        return f"]({posixpath.relpath(inside, folder or '.')}{anchor})"

    return re.sub(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", link, text)


def page_of(path: Path) -> tuple[str, dict[str, bytes]]:
    "A notebook as Markdown, and its images by name."
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    folder = path.parent.relative_to(NBS).as_posix()
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "raw" or "hide" in directives(cell.source):
            continue
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, folder)
        else:
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).strip()
        if cell.source:
            cells.append(cell)
    notebook.cells = cells
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    # tables of pandas in the style of the site's own
    text = re.sub(r"<style scoped>.*?</style>\n?", "", text, flags=re.DOTALL)
    text = text.replace('<table border="1" class="dataframe">', "<table>")
    images = {}
    for name, data in resources["outputs"].items():
        images[f"{path.stem}_files/{name}"] = data
        text = text.replace(f"]({name})", f"]({path.stem}_files/{name})")
    where = path.relative_to(ROOT).as_posix()
    lines = [f"[The notebook]({REPOSITORY}/blob/main/{where})"]
    if folder == "tutorials":
        lines.append(f"[open in Colab]({COLAB}{where})")
    if module := MODULE_OF.get(path):
        package = module.partition(".")[0]
        name = f"steer_nb.{module}"
        lines.append(f"[`{name}`](../reference/{package}.md#{name})")
    return f"{text}\n\n---\n\n{' · '.join(lines)}\n", images


def contents(folder: str, title: str) -> str:
    "The page of a folder: its notebooks, each with its first line."
    rows = [f"# {title}\n"]
    for path in notebooks():
        if path.parent.name == folder:
            name, quote = described(path)
            rows.append(f"- [{name}]({path.stem}.md): {linked(quote, folder)}")
    return "\n".join(rows) + "\n"


def reference(package: str) -> str:
    "The reference of a package: every module with its public names."
    rows = [f"# {package}\n"]
    for path in notebooks():
        module = MODULE_OF.get(path, "")
        if module.startswith(f"{package}."):
            rows.append(f"::: steer_nb.{module}\n")
    return "\n".join(rows)


TITLES = {"tutorials": "Tutorials", "results": "Results"} | {one: one for one in PACKAGES}


def on_config(config):
    "The navigation: tutorials, results, the library's notebooks, and the reference."
    pages = {
        folder: [
            {described(path)[0]: path.relative_to(NBS).with_suffix(".md").as_posix()}
            for path in notebooks()
            if path.parent.name == folder
        ]
        for folder in TITLES
    }

    def section(folder):
        return [f"{folder}/index.md", *pages[folder]]

    config.nav = [
        {"Home": "index.md"},
        {"Tutorials": section("tutorials")},
        {"Results": section("results")},
        {"Theory": "theory.md"},
        {"Library": [{package: section(package)} for package in PACKAGES]},
        {
            "Reference": [
                {subject: [f"reference/{package}.md" for package in packages]}
                for subject, packages in SUBJECTS.items()
            ]
        },
    ]
    return config


def on_files(files, config):
    "Put the generated pages in the place of the notebooks."
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)

    def add(name, content):
        files.append(File.generated(config, name, content=content))

    front = (ROOT / "README.md").read_text(encoding="utf-8")
    front = re.sub(r"(\]\()(?!\w+:|#)", r"\1../", front)  # from the repository to nbs/
    front = front.replace('="nbs/', '="')
    add("index.md", linked(front, ""))
    theory = files.get_file_from_path("theory.md")
    theory.content_string = linked(theory.content_string, "")
    for path in notebooks():
        folder = path.parent.name
        text, images = page_of(path)
        add(f"{folder}/{path.stem}.md", text)
        for name, data in images.items():
            add(f"{folder}/{name}", data)
    for folder, title in TITLES.items():
        add(f"{folder}/index.md", contents(folder, title))
    for package in PACKAGES:
        add(f"reference/{package}.md", reference(package))
    add("llms.txt", llms())
    add("site.css", (ROOT / "docs" / "site.css").read_text(encoding="utf-8"))
    return files


def llms() -> str:
    "The contents of the site for language models, as https://llmstxt.org describes it."
    site = f"{PROJECT['doc_host']}{PROJECT['doc_baseurl']}/"
    rows = [f"# {PROJECT['title']}\n", f"> {PROJECT['description']}\n"]
    for folder, title in TITLES.items():
        rows.append(f"\n## {title}\n")
        for path in notebooks():
            if path.parent.name == folder:
                name, quote = described(path)
                quote = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", quote)
                rows.append(f"- [{name}]({site}{folder}/{path.stem}.html): {quote}")
    return "\n".join(rows) + "\n"


def on_page_content(content, page, config, files):
    "Formulas as MathML."

    def formula(match):
        tex, block = html.unescape(match[2]), match[1] == "div"
        tex = tex.strip().removeprefix("\\[").removesuffix("\\]")
        tex = tex.removeprefix("\\(").removesuffix("\\)")
        return to_mathml(tex, display="block" if block else "inline")

    pattern = r'<(span|div) class="arithmatex">(.*?)</\1>'
    return re.sub(pattern, formula, content, flags=re.DOTALL)
