"""The documentation site: it builds without a warning, has every public name, and its links lead somewhere."""

import functools
import importlib
import inspect
import pathlib
import re
import shutil
import subprocess
import urllib.parse
from html.parser import HTMLParser

import anabranch
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


def test_every_public_header_is_there(names):
    """Each with what it declares first."""
    headers = [path for path in (PROJECT / "include/anabranch").glob("*.h") if path.name != "anabranch.h"]
    page = (PROJECT / "docs/site/cpp_api.md").read_text()
    assert sorted(re.findall(r"doxygenfile\} (\S+)", page)) == sorted(path.name for path in headers)
    documented = set().union(*(named for kind, named in names.items() if kind.startswith("cpp:")))
    for path in headers:
        declared = re.findall(r"^(?:class|struct|enum class) (\w+)(?: final)? ?[:{]", path.read_text(), re.MULTILINE)
        assert not [name for name in declared if f"anabranch::{name}" not in documented], path


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
