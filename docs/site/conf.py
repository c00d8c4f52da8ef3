"""The documentation site. tools/build_docs runs doxygen, then Sphinx with this; the sources are the repository's pages."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

project = "anabranch"
author = "the anabranch authors"
copyright = author  # noqa: A001
release = re.search(r"anabranch\s+VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text()).group(1)

# Where pages lie in the repository, there they lie here: links between them hold in both.
root_doc = "docs/site/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md", "docs/*.md", "docs/site/*.md"]
include_patterns += ["benchmarks/results/*.md", "benchmarks/results/scaling/cpu/report.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "breathe"]
myst_heading_anchors = 3
suppress_warnings = [
    "duplicate_declaration.cpp",  # every header opens the namespace
    "toc.no_title",  # of a page that a program writes: its title stands in the table of contents
]
myst_enable_extensions = ["colon_fence"]
default_role = "literal"  # `names` in docstrings

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
autodoc_mock_imports = ["megatron", "torchtitan"]

html_theme = "furo"
html_title = f"anabranch {release}"
html_extra_path = ["extra"]  # the folder's own page, which leads to the first one
html_theme_options = {"navigation_with_keys": True}
breathe_projects = {"anabranch": os.environ["ANABRANCH_DOXYGEN"]}
breathe_default_project = "anabranch"
