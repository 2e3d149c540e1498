"The documentation site as a reader meets it, in headless Chromium. Needs `make docs` first; without it, or without a browser, nothing is tested."

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest
from wlsft.site import broken

DOCS = Path(__file__).resolve().parent.parent / "_docs"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "make docs was not run" if not DOCS.is_dir() else "no Chromium" if not BROWSER else ""
if MISSING and not os.environ.get("REQUIRE_SITE"):
    pytest.skip(MISSING, allow_module_level=True)
assert not MISSING, MISSING
PAGES = sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.html") if "site_libs" not in p.parts)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=DOCS))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        b = p.chromium.launch(
            executable_path=BROWSER,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
        )
        yield b
        b.close()


@pytest.fixture
def page(browser, request):
    dark, phone = getattr(request, "param", (False, False))
    context = browser.new_context(
        viewport=dict(width=390 if phone else 1280, height=844), color_scheme="dark" if dark else "light"
    )
    p = context.new_page()
    p.trouble = []
    p.on("console", lambda m: p.trouble.append(m.text) if m.type in ("error", "warning") else None)
    p.on("pageerror", lambda e: p.trouble.append(str(e)))
    p.on(
        "request",
        lambda r: (
            p.trouble.append(f"asks for {r.url}")
            if not r.url.startswith(("http://127.0.0.1", "data:", "blob:"))
            else None
        ),
    )
    yield p
    context.close()


def test_nothing_leads_nowhere():
    assert broken(DOCS) == []


def test_every_chapter_is_a_page_and_no_equation_is_left_as_source():
    notebooks = [f for f in (DOCS.parent / "nbs").rglob("*.ipynb") if "checkpoint" not in f.name]
    assert len(PAGES) >= len(notebooks)
    assert not [
        p for p in PAGES if r"\(" in (DOCS / p).read_text() and 'class="math' in (DOCS / p).read_text()
    ]


@pytest.mark.parametrize(
    "page", [(False, False), (True, True)], indirect=True, ids=["light, desk", "dark, phone"]
)
def test_every_page_opens_without_error_and_fits(page, site):
    for name in PAGES:
        page.goto(site + name, wait_until="load")
        wide, room, words = page.evaluate(
            "[document.documentElement.scrollWidth, innerWidth, document.body.innerText.length]"
        )
        assert page.trouble == [], (name, page.trouble)
        assert wide <= room + 1, (name, wide)
        assert words > 300, name
        blank = page.evaluate(
            "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 80))"
        )
        assert blank == [], (name, blank)


@pytest.mark.parametrize("page", [(True, False)], indirect=True)
def test_dark_is_dark_and_can_be_left(page, site):
    page.goto(site + "index.html", wait_until="load")
    shade = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
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
    assert "knn_eval.html" in page.url and "knn_predict" in page.inner_text("body") and page.trouble == []


def test_api_reference_has_signatures_and_tables(page, site):
    page.goto(site + "knn_eval.html", wait_until="load")
    entry = page.evaluate(
        "(() => { let e = document.getElementById('knn_predict'), out = []; while (e = e.nextElementSibling) out.push(e.innerText); return out.join('\\n'); })()"
    )
    assert "knn_predict(" in entry and "Sequence[int]" in entry and "returns" in entry
    assert page.locator("nav#quarto-sidebar a, #quarto-sidebar a").count() > 25


def test_alpha_can_be_dragged(page, site):
    page.goto(site + "figures/explorer/alpha.html", wait_until="load")
    before, said = page.inner_html("#near"), page.inner_text("#said")
    page.locator("#alpha").focus()
    page.keyboard.press("End")
    assert (
        page.inner_text("#value") == "1.00"
        and page.inner_text("#said") != said
        and page.inner_html("#near") != before
    )
    page.locator("#strip button").nth(3).click()
    assert page.locator("#strip button").nth(3).get_attribute("aria-pressed") == "true"
    page.locator("#run").select_option(index=1)
    assert "change from" in page.inner_text("#said") and page.trouble == []
