"""The documentation site: it builds without a warning, has every public name, and its links lead somewhere."""

import functools
import html
import http.server
import importlib
import inspect
import json
import pathlib
import re
import shutil
import subprocess
import threading
import urllib.parse
from html.parser import HTMLParser
from xml.etree import ElementTree

import anabranch
import matplotlib.image
import pytest

PROJECT = pathlib.Path(__file__).resolve().parents[2]
sphinx = pytest.importorskip("sphinx")
from sphinx.util.inventory import InventoryFile  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("doxygen") is None, reason="doxygen is not installed")


@pytest.fixture(scope="session")
def site():
    """In a folder that stays, so that a second run has little to do."""
    result = subprocess.run([PROJECT / "tools/build_docs"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return PROJECT / "build/site/html"


@pytest.fixture(scope="session")
def names(site):
    with open(site / "objects.inv", "rb") as file:
        inventory = InventoryFile.load(file, "", urllib.parse.urljoin)
    return {kind: set(inventory[kind]) for kind in inventory}


def public(module):
    """(name, object) of what a module offers, and of the methods that its classes have of their own."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value) or name == "__version__":
            continue
        yield f"{module.__name__}.{name}", value
        for member, function in vars(value).items() if inspect.isclass(value) else ():
            if not member.startswith("_") and inspect.isfunction(inspect.unwrap(getattr(function, "__func__", function))):
                overrides = any(hasattr(base, member) for base in value.__mro__[1:])
                if not overrides:
                    yield f"{module.__name__}.{name}.{member}", function


@pytest.mark.parametrize("module", ["anabranch", "anabranch.functional"])
def test_every_public_python_name_is_documented(module, names):
    found = list(public(importlib.import_module(module)))
    assert len(found) > 9
    assert not [name for name, value in found if not inspect.getdoc(value)]
    documented = set().union(*(named for kind, named in names.items() if kind.startswith("py:")))
    assert not [name for name, _ in found if name not in documented]


def test_programs_in_docstrings_are_shown_as_such(site):
    """And not as a quotation, which a block without `::` before it would be."""
    page = (site / "docs/site/python_api.html").read_text()
    assert page.count('<div class="highlight') >= 4 and "<blockquote>" not in page


def test_every_public_header_is_there(names):
    """Each with what it declares first."""
    headers = [path for path in (PROJECT / "include/anabranch").glob("*.h") if path.name != "anabranch.h"]
    page = (PROJECT / "docs/site/cpp_api.md").read_text()
    assert sorted(re.findall(r"doxygenfile\} (\S+)", page)) == sorted(path.name for path in headers)
    documented = set().union(*(named for kind, named in names.items() if kind.startswith("cpp:")))
    for path in headers:
        declared = re.findall(r"^(?:class|struct|enum class) (\w+)(?: final)? ?[:{]", path.read_text(), re.MULTILINE)
        assert not [name for name in declared if f"anabranch::{name}" not in documented], path


# Whose name, type and class say all there is to say; anything else has words.
SAYS_IT_ITSELF = {
    "AdamWOptions": "beta1 beta2 epsilon seed",
    "AllToAllChoice": "chosen hierarchical_seconds row_bytes",
    "Communicator": "barrier count rank regroup_by reset_traffic size start_by start_rows_by traffic",
    "Exchange": "communicator placement",
    "ExpertCounts": "experts known_to_host",
    "ExpertPlacement": "at first_place is_blocks local_experts num_experts num_places num_ranks",
    "ExpertsImpl": "projections",
    "ForeignCallError": "code",
    "Gradients": "experts replicated",
    "GroupedGemmEngine": "name",
    "HeldExpert": "expert slice slices",
    "HiddenActivation": "activation glu",
    "MemoryPlan::Item": "bytes name",
    "Message": "bytes peer source target",
    "Messages": "incoming outgoing",
    "MoEFunction": "exchange options",
    "MoELayerImpl": "exchange options",
    "MuonOptions": "iterations momentum weight_decay",
    "NamedTensor": "name tensor",
    "ParallelGroups": "world",
    "RankInfo": "local_size rank size",
    "RouterImpl": "router_parameters",
    "SafetensorsReader": "entries file_bytes header_checksum",
    "SafetensorsReader::Entry": "bytes dtype shape",
    "Traffic": "bytes_received",
}


def undocumented(xml):
    """(how many public classes, functions, members and types there are, the names of those without a word). What the
    language demands counts as documented: constructors, destructors, assignment; so do overrides, and do_* behind a public call."""

    def described(node):
        return any("".join(node.find(f"{part}description").itertext()).strip() for part in ("brief", "detailed"))

    total, found = 0, []
    for path in sorted(xml.glob("*.xml")):
        for owner in ElementTree.parse(path).getroot().iter("compounddef"):
            name = owner.findtext("compoundname").removeprefix("anabranch::")
            if owner.get("kind") not in ("class", "struct", "namespace"):
                continue
            if owner.get("kind") != "namespace":
                total += 1
                found += [] if described(owner) else [name]
            for member in (node for node in owner.iter("memberdef") if node.get("prot") != "private"):
                own = member.findtext("name")
                total += 1
                demanded = own.strip("~") in (name.split("::")[-1], "ForeignCallError") or own.startswith(("operator", "do_"))
                demanded |= member.find("reimplements") is not None or own in ("to", "TORCH_MODULE") or own in SAYS_IT_ITSELF.get(name, "").split()
                found += [] if demanded or described(member) else [own if name == "anabranch" else f"{name}::{own}"]
    return total, sorted(set(found))


def test_public_names_of_cpp_have_words(site):
    """Each one's own, but for what says it itself."""
    total, without = undocumented(PROJECT / "build/site/doxygen")
    print(f"{total - len(without)} of {total} public names of C++ are documented")
    assert total > 400 and not without


class Page(HTMLParser):
    """Its links, and what can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        self.links += [values[key] for key in ("href", "src") if values.get(key)]


def test_links_lead_somewhere_and_nothing_comes_from_the_network(site):
    page_of = functools.cache(Page)
    broken, loaded = [], []
    for path in site.rglob("*.html"):
        for link in page_of(path).links:
            target, _, anchor = link.partition("#")
            target = urllib.parse.unquote(target.partition("?")[0])
            if re.match(r"[a-z]+:", target) or target.startswith("//"):
                continue
            goal = (path.parent / target).resolve() if target else path
            if not goal.exists() or (anchor and goal.suffix == ".html" and urllib.parse.unquote(anchor) not in page_of(goal).anchors):
                broken.append((path.relative_to(site), link))
        loaded += re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//[^"]+"', path.read_text())
    assert not broken, broken[:20]
    assert not loaded, loaded[:20]


def test_the_front_page_leads_to_it(site):
    assert "docs/site/index.html" in (site / "index.html").read_text()
    assert f"anabranch {anabranch.__version__}" in (site / "docs/site/index.html").read_text()


# Shows each page as wide as a screen and as a phone, and leaves in the page's title what is broken about it.
LOOKS = """
<!doctype html><title>not done</title><body><script>
const pages = PAGES, widths = [1280, 390], broken = [], looked = [];
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  const loaded = new Promise(done => frame.onload = done);
  frame.src = page;
  document.body.append(frame);
  await loaded;
  const page_ = frame.contentDocument, say = what => broken.push(`${page} at ${width}: ${what}`);
  const whole = page_.documentElement, article = page_.querySelector("article");
  if (whole.scrollWidth > width + 1) say(`${whole.scrollWidth} wide`);
  for (const image of page_.images) if (!image.complete || !image.naturalWidth) say(`${image.src} is not shown`);
  const box = article ? article.getBoundingClientRect() : {width: 0, height: 0};
  if (box.width < Math.min(width * 0.8, 600) || box.height < 100) say(`text of ${box.width} by ${box.height}`);
  for (const part of article ? article.querySelectorAll("pre, table, img, p, li") : []) {
    const own = part.getBoundingClientRect(), held = part.closest(".table-wrapper, pre, .highlight");
    if (own.right > box.right + 1 && !(held && getComputedStyle(held).overflowX != "visible"))
      say(`<${part.tagName}> ${part.textContent.slice(0, 40)} leaves the text by ${own.right - box.right}`);
  }
  looked.push(page);
  frame.remove();
}
(async () => {
  for (const width of widths) for (const page of pages) await look(page, width);
  document.title = JSON.stringify({broken, looked: looked.length});
})().catch(error => document.title = JSON.stringify({broken: [String(error)], looked: looked.length}));
</script>
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def browser(site, tmp_path):
    """Runs Chromium on a page of the site, given as text, with flags; returns what it prints. No other server is reached."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def show(path, *flags):
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=60000", *flags]
        url = f"http://127.0.0.1:{server.server_port}/{path}"
        return subprocess.run([*command, url], capture_output=True, text=True, timeout=240, check=True).stdout

    yield show
    server.shutdown()


def pages_of(site):
    """Those that people write or look into; sources of modules aside."""
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return [page for page in pages if not page.startswith("_modules") and page not in ("index.html", "genindex.html", "search.html")]


def test_pages_keep_their_layout_in_a_browser(site, browser):
    """On a screen and on a phone nothing leaves its place, and every picture is shown."""
    pages = [page for page in pages_of(site) if "py-modindex" not in page]
    assert len(pages) >= 15
    (site / "looks.html").write_text(LOOKS.replace("PAGES", json.dumps(pages)))
    try:
        (title,) = re.findall(r"<title>(.*?)</title>", browser("looks.html", "--dump-dom"), re.DOTALL)
    finally:
        (site / "looks.html").unlink()
    found = json.loads(html.unescape(title))
    assert found["looked"] == 2 * len(pages) and not found["broken"], "\n".join(found["broken"])


def test_screenshots_of_the_main_pages(site, browser):
    """For people, in build/site; of each there is more to see than an empty page."""
    for name in ("index", "cpp_api"):
        picture = site.parent / f"{name}.png"
        browser(f"docs/site/{name}.html", f"--screenshot={picture}", "--window-size=1280,900")
        pixels = matplotlib.image.imread(picture)[..., :3]
        assert pixels.shape[:2] == (900, 1280) and (pixels.max(axis=-1) < 0.5).mean() > 0.005, name
