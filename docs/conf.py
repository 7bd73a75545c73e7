"""Sphinx: the site of the documentation (``make docs``)."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes

from farplug.version import __version__

project = "farplug"
author = "The farplug developers"
project_copyright = "The farplug developers"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 90
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

highlight_language = "none"
suppress_warnings = ["ref.python"]  # two classes have an attribute of the same name

html_theme = "furo"
html_title = f"farplug {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


def name_pages(app: Any, doctree: nodes.document, page: str) -> None:
    """Give links that read as the name of a file, ``disk.md``, the title of its page."""
    for link in doctree.findall(nodes.reference):
        match = re.fullmatch(r"([\w-]+)\.md", link.astext())
        if match and link.get("internal") and match[1] in app.env.titles:
            link.clear()
            link += nodes.inline("", app.env.titles[match[1]].astext())


def setup(app: Any) -> None:
    """Connect the function above."""
    app.connect("doctree-resolved", name_pages)
