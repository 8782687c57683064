"""The documentation of Dataflow: built from the installed packages, warnings are errors."""

from importlib.metadata import version as installed_version

project = "Dataflow"
author = "The Dataflow maintainers"
version = release = installed_version("tiered-dataflow")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"Dataflow {release}"
# Pages must open without a network.
html_theme_options = {"source_repository": "", "footer_icons": []}
html_copy_source = False

myst_heading_anchors = 3
smartquotes = False  # it would make a dash of the two in --option

# Docstrings write names in single backticks.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
