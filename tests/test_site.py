"""The documentation as a site: it builds without a warning, all that it names is there, and it opens without a network."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import papr_fx

from .site import Site

ROOT = Path(__file__).parent.parent
TASKS = (
    "index",
    "your-model",
    "serve",
    "dense",
    "video",
    "training",
    "evaluation",
    "deployment",
    "reading-diffs",
    "write-a-pass",
)


def build(folder, *options):
    """Builds the site into a folder; returns what was printed."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder), *options]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "site"
    assert build(folder) == (0, "")
    return Site(folder)


def test_every_task_has_a_page(site):
    assert {f"{task}.html" for task in TASKS} <= site.pages.keys()


def test_links_lead_to_pages_and_sections(site):
    assert site.broken_links() == []


def test_nothing_is_loaded_from_another_host(site):
    assert site.broken_resources() == []
    # The theme would load a library for drawings from another host.
    assert not any("mermaid" in page.classes for page in site.pages.values())


def test_markdown_is_understood(site):
    assert site.literal_markdown() == []


def test_files_of_the_repository_that_pages_link_to_are_there(site):
    golden = "tests/golden/vit_small_patch16_224_coarse.diff"
    assert f"files/{golden}" in site.pages["coarse.html"].links
    assert (site.folder / "files" / golden).read_bytes() == (ROOT / golden).read_bytes()


@pytest.mark.parametrize("name", papr_fx.__all__)
def test_every_public_name_is_in_the_reference(site, name):
    value = getattr(papr_fx, name)
    wanted = {value.__name__} if inspect.ismodule(value) else {f"papr_fx.{name}", f"{value.__module__}.{name}"}
    assert any(wanted & page.ids for address, page in site.pages.items() if address.startswith("api/"))


def test_a_broken_site_is_seen(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="one">[text](b.html)</p><a href="b.html#two"></a><a href="b.html#three"></a>'
        '<a href="#one"></a><a href="c.html"></a>'
        '<img src="none.png"><script src="https://example.org/x.js"></script><link rel="stylesheet" href="s.css">'
        "<p>a\n- b</p><p>a<em>b</em></p><p><code>[](</code></p><style>@import '//example.org/s.css';</style>"
    )
    (tmp_path / "b.html").write_text('<h1 id="two"></h1><a href="https://example.org"></a>')
    (tmp_path / "s.css").write_text("@font-face { src: url(https://example.org/f.woff2) } p { background: url('data:,') }")
    site = Site(tmp_path)
    assert site.broken_links() == ["a.html: b.html#three", "a.html: c.html"]
    found = [
        "a.html: none.png",
        "a.html: https://example.org/x.js",
        "a.html: //example.org/s.css",
        "s.css: https://example.org/f.woff2",
    ]
    assert site.broken_resources() == found
    assert site.literal_markdown() == ["a.html: [text](b.html)", "a.html: a\n- b", "a.html: a<em>b</em>"]


DRIVER = """<!doctype html><title>driver</title><iframe id="frame" width="1300" height="900"></iframe><pre id="told"></pre>
<script>
const frame = document.getElementById("frame"), told = [], pause = (ms) => new Promise((done) => setTimeout(done, ms))
const loaded = () => new Promise((done) => frame.addEventListener("load", done, { once: true }))
const open = async (address) => { const wait = loaded(); frame.src = address; await wait; return frame.contentDocument }
async function search(words) {
  const page = await open("index.html"), box = page.querySelector("input[name=query]")
  box.focus()
  box.value = words
  box.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }))
  for (let tries = 0; tries < 100; tries++, await pause(100)) {
    const links = [...page.querySelectorAll("a.md-search-result__link")]
    if (!links.length) continue
    const wait = loaded()
    links[0].click()
    await wait
    return `${links.length > 1} ${frame.contentDocument.title}`
  }
  return "nothing"
}
async function run() {
  for (const address of ADDRESSES) {
    const page = await open(address), heading = page.querySelector(".md-content h1")
    const pictures = [...page.images].filter((picture) => picture.complete && !picture.naturalWidth)
    told.push(`${address} ${heading && heading.offsetHeight ? "shown" : "empty"} ${pictures.length}`)
  }
  told.push("search " + (await search("token_map")))
}
run().catch((error) => told.push("failed " + error)).then(() => {
  document.getElementById("told").textContent = told.join("\\n") + "\\nend"
})
</script>"""


@pytest.mark.slow
def test_it_opens_from_a_disk(site, tmp_path):
    """Every page in a browser without a network, and a word in the search box."""
    addresses = [address for address in site.pages if address != "404.html"]  # which servers show, at any address
    driver = site.folder / "driver.html"
    driver.write_text(DRIVER.replace("ADDRESSES", repr(addresses)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", f"--user-data-dir={tmp_path}"]
    options += [
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        "--virtual-time-budget=120000",
        "--dump-dom",
    ]
    try:
        done = subprocess.run(["chromium", *options, driver.as_uri()], capture_output=True, text=True, check=True, timeout=300)
    finally:
        driver.unlink()
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, flags=re.DOTALL)[1].splitlines()
    assert told == [*(f"{address} shown 0" for address in addresses), "search true Questions - papr-fx", "end"]
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
