"""The documentation's settings: `make docs` builds it into docs/_build."""

import sys
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import costs  # noqa: E402
import docstrings  # noqa: E402

import fastelbo  # noqa: E402

project, author = "fastelbo", "the fastelbo authors"
copyright = f"{author}, MIT licence"
version = release = fastelbo.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "mathml",
]
exclude_patterns = ["_build"]
needs_sphinx = "8.1"

myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline", "deflist", "substitution"]
myst_substitutions = costs.costs()
myst_heading_anchors = 3

copybutton_selector = "div:not(.highlight-text) > div.highlight > pre"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_use_rtype = False
default_role = "code"  # a docstring's single backticks are those of Markdown
add_module_names = False
toc_object_entries_show_parents = "hide"

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"fastelbo {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"source_edit_link": "", "navigation_with_keys": True}

INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}


def is_reached(base: str) -> bool:
    try:
        with urllib.request.urlopen(base + "objects.inv", timeout=5):
            return True
    except (urllib.error.URLError, OSError) as error:
        print(f"no links to {base}: {error}")
        return False


# Links to other projects' pages are a gain, and not what a build without a network should fail for: those whose inventory
# cannot be had are left out, and said so.
intersphinx_mapping = {name: (base, None) for name, base in INVENTORIES.items() if is_reached(base)}


def setup(app) -> None:
    docstrings.connect(app)
