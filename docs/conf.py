"""Sphinx configuration: `python -m sphinx -W -b html docs docs/_build/html`."""

import os
import sys
import warnings
from pathlib import Path

import sktl

# Examples import one another. Ray must not send usage statistics.
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

project = "sktl"
author = "The sktl developers"
copyright = f"2026, {author}"
version = release = sktl.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]
# Single backticks link to public names, and are code otherwise.
default_role = "py:obj"

autodoc_typehints = "none"  # the types are in the docstrings
# scikit-learn generates these, with references to its own pages.
autodoc_default_options = {
    "exclude-members": "set_fit_request, set_partial_fit_request, set_score_request"
}
autosummary_generate = True
numpydoc_show_class_members = False  # the class template lists the methods
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# Warnings of the examples are errors, as in the tests.
warnings.filterwarnings("error", category=UserWarning, module="sktl")
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "doc_module": ("sktl",),
    "backreferences_dir": "api/backreferences",
    "inspect_global_variables": False,
    "copyfile_regex": r"three_strategies\.py",
}

html_theme = "pydata_sphinx_theme"
html_title = "sktl"
html_static_path = ["_static"]
html_css_files = ["sktl.css"]
html_show_sourcelink = False
html_theme_options = {
    "header_links_before_dropdown": 6,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": [], "getting_started": [], "changelog": []}
