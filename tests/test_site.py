"""The documentation site as a reader meets it, in headless Chromium.

Needs `make docs` first. Without it, or without a browser, nothing is tested.
"""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest
from wlsft.build.site import broken

DOCS = Path(__file__).resolve().parent.parent / "_docs"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = ""
if not DOCS.is_dir():
    MISSING = "make docs was not run"
elif not BROWSER:
    MISSING = "no Chromium"
if MISSING and not os.environ.get("REQUIRE_SITE"):
    pytest.skip(MISSING, allow_module_level=True)
assert not MISSING, MISSING
PAGES = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.html") if "site_libs" not in p.parts)
EXPLORER = "figures/explorer/alpha.html"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    handler = functools.partial(Quiet, directory=DOCS)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=BROWSER, args=options)
        yield chromium
        chromium.close()


def watch(page):
    "Collect errors, warnings and requests to other sites in `page.trouble`."
    page.trouble = []

    def on_console(message):
        if message.type in ("error", "warning"):
            page.trouble.append(message.text)

    def on_request(request):
        if not request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            page.trouble.append(f"loads {request.url}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("request", on_request)


@pytest.fixture
def page(browser, request):
    dark, width = getattr(request, "param", (False, 1280))
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport=dict(width=width, height=844), color_scheme=scheme)
    p = context.new_page()
    watch(p)
    yield p
    context.close()


def test_nothing_leads_nowhere():
    assert broken(DOCS) == []


def test_every_chapter_is_a_page_and_no_equation_is_left_as_source():
    notebooks = [f for f in (DOCS.parent / "nbs").rglob("*.ipynb") if "checkpoint" not in f.name]
    assert len(PAGES) >= len(notebooks)
    for name in PAGES:
        text = (DOCS / name).read_text()
        assert not (r"\(" in text and 'class="math' in text), name


WIDE_CODE = """
[...document.querySelectorAll("pre")]
  .filter((pre) => !pre.closest(".cell-output, .cell-output-stdout"))
  .filter((pre) => pre.scrollWidth > pre.clientWidth + 1)
  .map((pre) => `${pre.scrollWidth} > ${pre.clientWidth}: ${pre.innerText.slice(0, 80)}`)
"""
VIEWS = {"light, desk": (False, 1300), "dark, phone": (True, 390)}


@pytest.mark.parametrize("page", VIEWS.values(), indirect=True, ids=VIEWS)
def test_every_page_opens_without_error_and_fits(page, site):
    "On a desk no code needs sideways scrolling either."
    for name in PAGES:
        page.goto(site + name, wait_until="load")
        width, room, letters = page.evaluate(
            "[document.documentElement.scrollWidth, innerWidth, document.body.innerText.length]"
        )
        assert page.trouble == [], (name, page.trouble)
        assert width <= room + 1, (name, width)
        assert letters > 300, name
        blank = page.evaluate(
            "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 80))"
        )
        assert blank == [], (name, blank)
        assert room < 1000 or page.evaluate(WIDE_CODE) == [], name


@pytest.mark.parametrize("page", [(True, 1280)], indirect=True)
def test_dark_is_dark_and_can_be_left(page, site):
    page.goto(site + "index.html", wait_until="load")
    shade = (
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)"
        ".reduce((sum, part) => sum + +part, 0)"
    )
    assert page.evaluate(shade) < 200
    page.locator(".quarto-color-scheme-toggle:visible").first.click()
    page.wait_for_timeout(300)
    assert page.evaluate(shade) > 600


def test_search_finds_a_function_and_goes_there(page, site):
    page.goto(site + "index.html", wait_until="load")
    page.locator("input[type=search]:visible").fill("knn_predict")
    page.locator(".search-result").first.wait_for()
    page.locator(".search-result", has_text="knn_predict").first.click()
    page.wait_for_load_state("load")
    assert "knn_eval.html" in page.url and "knn_predict" in page.inner_text("body")
    assert page.trouble == []


def test_api_reference_has_signatures_and_tables(page, site):
    page.goto(site + "knn_eval.html", wait_until="load")
    entry = page.evaluate(
        "(() => { let e = document.getElementById('knn_predict'), out = [];"
        " while (e = e.nextElementSibling) out.push(e.innerText); return out.join('\\n'); })()"
    )
    assert "knn_predict(" in entry and "Sequence[int]" in entry and "returns" in entry
    assert page.locator("nav#quarto-sidebar a, #quarto-sidebar a").count() > 25


def test_a_page_in_a_folder_leads_back(page, site):
    page.goto(site + "evaluation/probe.html", wait_until="load")
    page.locator("#quarto-sidebar a", has_text="k-NN").first.click()
    page.wait_for_load_state("load")
    assert page.url.endswith("/knn_eval.html") and page.trouble == []


def test_alpha_can_be_dragged(page, site):
    page.goto(site + EXPLORER, wait_until="load")
    near, summary = page.inner_html("#near"), page.inner_text("#summary")
    page.locator("#alpha").focus()
    page.keyboard.press("End")
    assert page.inner_text("#value") == "1.00"
    assert page.inner_text("#summary") != summary
    assert page.inner_html("#near") != near
    page.locator("#strip button").nth(3).click()
    assert page.locator("#strip button").nth(3).get_attribute("aria-pressed") == "true"
    page.locator("#run").select_option(index=1)
    assert "change from" in page.inner_text("#summary") and page.trouble == []
