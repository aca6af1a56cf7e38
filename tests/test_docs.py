"The documentation site: built strictly, complete, without dead links, and without other servers."

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest
from repository import NBS, NOTEBOOKS, ROOT


class Links(HTMLParser):
    "The ids of a page, its links, and what it loads."

    def __init__(self, page: Path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe") and found.get("src"):
            self.loaded.append(found["src"])
        if tag == "link" and "stylesheet" in (found.get("rel") or ""):
            self.loaded.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the site, built from the notebooks."
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder.resolve()


@pytest.fixture(scope="module")
def pages(site):
    return {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}


def test_every_notebook_is_a_page_and_in_llms_txt(site):
    notebooks = [path.relative_to(NBS) for path in NOTEBOOKS if path.parent != NBS]
    contents = (site / "llms.txt").read_text(encoding="utf-8")
    for path in notebooks:
        page = path.with_suffix(".html")
        assert (site / page).exists() and f"/{page.as_posix()})" in contents


def test_every_link_leads_somewhere(site, pages):
    dead = []
    for page, own in pages.items():
        for link in [*own.links, *own.loaded]:
            path, anchor = urldefrag(link)
            if urlparse(link).scheme or urlparse(link).netloc:
                continue
            target = (page.parent / unquote(path)).resolve() if path else page
            known = pages[target].ids if target in pages else {anchor}
            if not target.exists() or (anchor and unquote(anchor) not in known):
                dead.append((page.relative_to(site), link))
    assert dead == []


def test_nothing_is_loaded_from_another_server(pages):
    loaded = {source for own in pages.values() for source in own.loaded}
    assert {
        source[:60] for source in loaded if urlparse(source).scheme in ("http", "https")
    } == set()


def test_formulas_are_mathml(site):
    theory = (site / "theory.html").read_text(encoding="utf-8")
    assert theory.count("<math") > 30 and "arithmatex" not in theory and "$$" not in theory
