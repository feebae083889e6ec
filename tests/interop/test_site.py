"""The built site, opened in a browser: formulas, pictures, search, navigation, and a phone's width.

The site is the folder that ``JAXLOSSES_SITE`` names, or else is built here.
"""

import html
import os
import re
import shutil
import subprocess
import sys
from inspect import ismodule
from pathlib import Path

import pytest

import jaxlosses as jl
import jaxlosses.flax as jlf

DOCS = Path(__file__).parents[2] / ".github" / "docs"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium to open the site in", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if folder := os.environ.get("JAXLOSSES_SITE"):
        return Path(folder).resolve()
    for module in ("sphinx", "furo", "myst_parser", "latex2mathml"):
        pytest.importorskip(module)
    if not DOCS.exists():
        pytest.skip("the pages are not here, only the tests")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-d", out / ".doctrees", DOCS, out]
    subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return out


def opened(url, profile):
    """The document that the browser has after it ran the page's scripts."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    options += ["--virtual-time-budget=8000", f"--user-data-dir={profile}", "--dump-dom"]
    run = subprocess.run([CHROMIUM, *options, url], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_navigation_leads_to_every_page(site, tmp_path):
    page = opened(f"file://{site}/index.html", tmp_path)
    sidebar = page[page.index('class="sidebar-tree"') :]
    pages = sorted(path.stem for path in DOCS.glob("*.md")) if DOCS.exists() else ["recipes"]
    for name in pages:
        assert name == "index" or f'href="{name}.html"' in sidebar, name
    reference = opened(f"file://{site}/reference/index.html", tmp_path)
    public = {name for name, value in vars(jl).items() if name[0] != "_" and not ismodule(value)}
    assert set(jl.__all__) == public
    own = vars(jlf).items()
    of_flax = [f"flax.{k}" for k, v in own if getattr(v, "__module__", "") == jlf.__name__]
    for name in (*public, *(name for name in of_flax if not name.startswith("flax._"))):
        assert f'href="{name}.html' in reference, name
        assert (site / "reference" / f"{name}.html").exists()


def test_formulas_are_mathml(site, tmp_path):
    page = opened(f"file://{site}/reference/softmax_cross_entropy.html", tmp_path)
    assert page.count("<math") >= 2
    assert "<msup>" in page
    for path in (site / "reference").glob("*.html"):
        text = html.unescape(re.sub(r"<[^>]+>", "", path.read_text()))
        assert "$$" not in text, path
        assert not re.search(r"\\(text|frac|log|sum|cdot)", text), path


def test_pictures_are_there_and_nothing_comes_from_elsewhere(site):
    for path in site.rglob("*.html"):
        text = path.read_text()
        for source in re.findall(r'<img[^>]* src="([^"]+)"', text):
            assert (path.parent / source).exists(), (path, source)
        fetched = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]+)"', text)
        fetched += re.findall(r'<link[^>]* rel="stylesheet"[^>]* href="([^"]+)"', text)
        assert not [url for url in fetched if url.startswith(("http", "//"))], path


def test_search_finds_a_loss(site, tmp_path):
    page = opened(f"file://{site}/search.html?q=mean_pairwise_squared_error", tmp_path)
    assert "reference/mean_pairwise_squared_error.html" in page[page.index("search-results") :]


def test_no_page_is_wider_than_a_phone(site, tmp_path):
    pages = [path.relative_to(site) for path in site.rglob("*.html")]
    frames = "".join(
        f'<iframe id="{page}" src="file://{site / page}" width="390" height="800"></iframe>'
        for page in pages
    )
    script = """
      onload = () => { for (const frame of document.querySelectorAll("iframe")) {
        const width = frame.contentDocument.documentElement.scrollWidth;
        document.body.append(`[${frame.id} ${width}]`);
      } }
    """
    measure = tmp_path / "measure.html"
    measure.write_text(f"<!doctype html><body>{frames}<script>{script}</script></body>")
    page = opened(f"file://{measure}", tmp_path / "profile")
    widths = dict(re.findall(r"\[(\S+\.html) (\d+)\]", page))
    assert widths.keys() == {str(path) for path in pages}
    assert {name: width for name, width in widths.items() if int(width) > 390} == {}
