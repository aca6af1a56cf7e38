"The playground in JupyterLab, in Notebook 7 and as a page of its own, in a real browser."

import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.ui,
    pytest.mark.skipif(
        BROWSER is None and "STEER_NB_SCREENSHOTS" not in os.environ,  # `make test-ui` sets it
        reason="no Chromium (on Debian: apt install chromium)",
    ),
]

TUTORIAL = Path(__file__).parent.parent / "nbs" / "tutorials" / "06_playground.ipynb"
BEFORE = """\
inputs = tokenizer("I thought the meal was", return_tensors="pt")
before = model(**inputs).logits"""
AFTER = """\
assert playground.state["strengths"] == {"positive": 2.0, "formal": 0.0}, playground.state
assert model(**inputs).logits.equal(before)
playground.close()
assert model(**inputs).logits.equal(before)
print("the model is as it was")"""


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    "Where screenshots are written: STEER_NB_SCREENSHOTS, to look at them, or a temporary folder."
    folder = Path(os.environ.get("STEER_NB_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        assert BROWSER, "no Chromium (on Debian: apt install chromium)"
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with the tutorial up to the playground, and two cells of ours."
    folder = tmp_path_factory.mktemp("lab")
    sources = [one.source for one in nbformat.read(TUTORIAL, 4).cells if one.cell_type == "code"]
    end = next(i for i, source in enumerate(sources) if source.startswith("playground ="))
    sources = ["\n".join(sources[:end]), BEFORE, sources[end], AFTER]
    cells = [nbformat.v4.new_code_cell(one) for one in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    nbformat.write(notebook, folder / "play.ipynb")
    return folder


@contextmanager
def served(folder: Path, program: str, page: str, *options: str):
    "The address of a notebook in a Jupyter program, such as `jupyterlab`, that serves the folder."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", program, "--no-browser", "--allow-root", f"--port={port}"]
    command += [f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=test", *options]
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    server = subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        for line in server.stderr:
            if f":{port}/" in line:
                break
        subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)  # keep it empty
        yield f"http://127.0.0.1:{port}/{page}/play.ipynb?token=test"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    "A page with recorded states of two values."
    from steer_nb import contrast_vector, explore, load_model

    model, tokenizer = load_model("smollm2-135m")
    texts = ["What a lovely day!", "I loved it."], ["What a horrible day!", "I hated it."]
    contrast_vector(model, tokenizer, *texts, name="positive", layers=[18])
    playground = explore(model, tokenizer, prompt="I thought the meal was", strengths={})
    path = tmp_path_factory.mktemp("recording") / "playground.html"
    return playground.save_html(path, values=(0, 4), max_new_tokens=8)


class Page:
    "A page with a playground."

    def __init__(self, page):
        self.page, self.errors = page, []
        page.on("pageerror", lambda error: self.errors.append(error))

    def strength(self):
        return self.page.get_by_label("strength of positive")

    def tokens(self) -> str:
        return self.page.inner_text(".steer-nb .tokens tbody")

    def first(self) -> list[float]:
        "The probabilities of the first row: steered, unsteered."
        row = self.page.locator(".steer-nb .tokens tbody tr:first-child .number")
        return [float(text) for text in row.all_inner_texts()]

    def text(self, column: int) -> str:
        "The generated text: 0 is steered, 1 unsteered."
        return self.page.locator(".steer-nb .text").nth(column).inner_text()

    def press(self, key: str, times: int = 1) -> None:
        "Press a key on the slider, and wait until the next tokens are others."
        before = self.tokens()
        self.strength().focus()
        for _ in range(times):
            self.page.keyboard.press(key)
        self.wait(
            "before => document.querySelector('.steer-nb .tokens tbody').innerText != before",
            before,
        )

    def wait(self, script: str, value=None) -> None:
        self.page.wait_for_function(script, arg=value, timeout=20_000)

    def run(self, number: int) -> None:
        "Run a cell of the notebook, without waiting for its end."
        self.page.locator(".jp-CodeCell .jp-InputArea-editor").nth(number).click()
        self.page.keyboard.press("Shift+Enter")

    def command(self, name: str, arguments: dict | None = None) -> None:
        "Run a command of JupyterLab, without waiting for its end."
        script = "([name, arguments]) => { window.jupyterapp.commands.execute(name, arguments) }"
        self.page.evaluate(script, [name, arguments or {}])

    def widths(self) -> tuple[int, int]:
        "The width of the content of the playground, and that of the playground."
        script = "it => [it.scrollWidth, it.clientWidth]"
        return tuple(self.page.locator(".steer-nb").evaluate(script))


@pytest.fixture
def lab(folder):
    with served(folder, "jupyterlab", "lab/tree", "--LabApp.expose_app_in_browser=True") as address:
        yield f"{address}&reset"


def test_the_playground_in_notebook_7(browser, folder, screenshots):
    with served(folder, "notebook", "notebooks") as address:
        tab = browser.new_page(viewport={"width": 1000, "height": 1400})
        page = Page(tab)
        tab.goto(address)
        tab.wait_for_selector(".jp-CodeCell .jp-InputArea-editor", timeout=60_000)
        started = "() => document.querySelector('.jp-InputPrompt').innerText != '[ ]:'"
        for _ in range(20):  # a cell that is run before the kernel is connected does not run
            page.run(0)
            if tab.evaluate(started):
                break
            tab.wait_for_timeout(1000)
        page.run(2)
        tab.wait_for_selector(".steer-nb .tokens tbody tr", timeout=60_000)
        before = page.first()
        page.press("ArrowLeft")
        assert page.strength().input_value() == "2.9"
        steered, unsteered = page.first()
        assert unsteered == before[1] and steered != before[0]
        inside, outside = page.widths()
        assert inside <= outside
        tab.screenshot(path=screenshots / "notebook.png")
        # Notebook 7.6 raises an error of its own when it starts
        assert [one for one in page.errors if "notebook_core" not in one.stack] == []
        tab.close()


def test_the_playground_in_jupyterlab(browser, lab, screenshots):
    tab = browser.new_page(viewport={"width": 1200, "height": 1400})
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = Page(tab)
    tab.goto(lab)
    tab.wait_for_selector("text=| Idle", timeout=60_000)
    for cell in range(3):
        page.run(cell)
    tab.wait_for_selector(".steer-nb .tokens tbody tr", timeout=60_000)
    assert page.strength().input_value() == "3"
    tab.wait_for_selector(".steer-nb .map td")
    tab.click("text=Generate")
    tab.wait_for_selector("text=Stop")
    tab.wait_for_selector("text=Generate", timeout=60_000)
    tab.locator(".steer-nb").screenshot(path=screenshots / "playground.png")
    tab.get_by_label("set positive to 0").click()
    numbers = "[...document.querySelectorAll('.steer-nb tbody tr:first-child .number')]"
    page.wait(f"() => new Set({numbers}.map(one => one.textContent)).size == 1")

    # at strength 0 both models are the same; a slider that moves changes the steered one only
    steered, unsteered = page.first()
    assert steered == unsteered and page.strength().input_value() == "0"
    page.press("ArrowRight")
    page.press("ArrowRight", times=19)
    page.wait("() => document.querySelector('.steer-nb output').textContent == '2.0'")
    page.wait("() => document.querySelector('.steer-nb').dataset.busy == 'false'")
    steered, unsteered = page.first()
    assert steered > 2 * unsteered
    assert len(tab.locator(".steer-nb .map tbody td").all()) == 30 * 5
    tab.screenshot(path=screenshots / "light.png")

    # the map by keyboard, and the logit lens, whose top row is the model's prediction
    tab.locator(".steer-nb .map").focus()
    tab.keyboard.press("ArrowDown")
    assert tab.inner_text(".steer-nb .says").startswith("layer 28, ")
    tab.get_by_label("most likely token").click()
    tab.wait_for_selector(".steer-nb .map.lens")
    top = tab.locator(".steer-nb .map tbody tr:first-child td").last.inner_text()
    assert top and page.tokens().startswith(top)

    # a text streams, and stops
    tab.get_by_label("number of new tokens").fill("400")
    tab.click("text=Generate")
    page.wait("() => document.querySelector('.steer-nb .text').childElementCount > 5")
    tab.click("text=Stop")
    tab.wait_for_selector("text=Generate")
    written = page.text(0)
    assert page.text(1) != written and "nats per token" in tab.inner_text(".steer-nb .mean")
    tab.wait_for_timeout(500)
    assert page.text(0) == written

    # copy as code, an error, dark, and narrow
    tab.click("text=Copy as code")
    tab.wait_for_selector("text=Copied.")
    code = tab.evaluate("() => navigator.clipboard.readText()")
    assert "explore(" in code and "strengths={'positive': 2" in code
    tab.get_by_label("prompt").fill("")
    tab.wait_for_selector("text=the prompt is empty")
    tab.get_by_label("prompt").fill("I thought the meal was")
    tab.wait_for_selector("text=the prompt is empty", state="detached")
    page.command("apputils:change-theme", {"theme": "JupyterLab Dark"})
    tab.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
    tab.set_viewport_size({"width": 700, "height": 1400})
    tab.wait_for_timeout(1000)
    tab.screenshot(path=screenshots / "dark.png")
    inside, outside = page.widths()
    assert inside <= outside

    # the last cell looks at the model, and closes the playground
    tab.set_viewport_size({"width": 1200, "height": 1400})
    page.run(3)
    tab.wait_for_selector(".jp-OutputArea-output pre:text-is('the model is as it was')")

    # after a restart a new run works
    page.command("notebook:restart-kernel")
    tab.click(".jp-Dialog button.jp-mod-accept")
    tab.wait_for_selector("text=| Idle", timeout=60_000)
    page.run(0)
    page.run(2)
    tab.wait_for_selector(".steer-nb .tokens tbody tr", timeout=60_000)
    page.press("ArrowLeft")
    assert page.errors == []
    tab.close()


@pytest.mark.parametrize("width", [1000, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_page_without_a_kernel(recording, browser, screenshots, theme, width):
    tab = browser.new_page(viewport={"width": width, "height": 1100}, color_scheme=theme)
    page = Page(tab)
    tab.goto(recording.as_uri())
    tab.wait_for_selector(".steer-nb .tokens tbody tr")
    steered, unsteered = page.first()
    assert steered == unsteered and page.text(0) == page.text(1) != ""
    page.press("ArrowRight")
    steered, unsteered = page.first()
    assert steered != unsteered and page.text(0) != page.text(1)
    tab.screenshot(path=screenshots / f"page-{theme}-{width}.png")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    paper = tab.locator(".steer-nb").evaluate("it => getComputedStyle(it).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[theme]
    assert page.errors == []
    tab.close()
