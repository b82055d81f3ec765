"""How the documentation is built: `make docs`, which takes every warning as an error."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generated_reference

project = "Asynception"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "Asynception"
exclude_patterns = ["_build", "reference/sizing_table.md"]
myst_heading_anchors = 3
default_role = "code"
"""Docstrings mark code with single backticks."""

autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"


def setup(app: object) -> None:
    """Write the pages that follow from the code before Sphinx looks for pages."""
    generated_reference.write(Path(__file__).parent / "reference")
