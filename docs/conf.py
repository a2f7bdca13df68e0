# SPDX-License-Identifier: Apache-2.0
"""How Sphinx builds the documentation: ``make docs``."""

import json
import sys
from pathlib import Path

from vhost_rpmb import __version__

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from bench import page, plots  # noqa: E402

project = "vhost-rpmb"
release = __version__
author = "the vhost-rpmb authors"
copyright = "2026, the vhost-rpmb authors"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["man"]
nitpicky = True
nitpick_ignore_regex = [("py:class", r"vhost_rpmb\..*|os\..*")]
myst_heading_anchors = 3
myst_links_external_new_tab = False
autodoc_typehints = "signature"

html_theme = "furo"
html_title = "vhost-rpmb"

# Of the run that docs/performance.md shows.
plots.draw(json.loads(page.RUN.read_text()), DOCS / "plots")
