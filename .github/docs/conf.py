"""How Sphinx builds the site; the command is in CONTRIBUTING.md."""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT)]  # site_extension, and the package of this checkout.

metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
project = metadata["name"]
author = metadata["authors"][0]["name"]
project_copyright = author
version = release = metadata["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "site_extension"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
nitpicky = True  # A name that leads nowhere is a warning, and the command makes warnings errors.

# Markdown as on GitHub, with formulas, and with a link from every heading to itself.
myst_enable_extensions = ["attrs_block", "dollarmath"]
myst_heading_anchors = 3

# Docstrings have the types of arguments in words and shapes.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = False  # It would call attributes "Variables".
napoleon_attr_annotations = False

# Formulas are MathML, which browsers draw without a script and without the network.
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"{project} {version}"
html_show_sphinx = False
html_domain_indices = False  # A list of one module.
html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": metadata["urls"]["Source"] + "/",
    "source_branch": "main",
    "source_directory": ".github/docs/",
    "top_of_page_buttons": ["view"],
    "light_css_variables": {"scroll-shadow": "rgb(0 0 0 / 25%)"},
    "dark_css_variables": {
        "scroll-shadow": "rgb(255 255 255 / 30%)",
        "color-code-background": "#202124",
    },
}
highlight_language = "python"
pygments_dark_style = "github-dark"  # The default one underlines names as if they were links.
source_url = metadata["urls"]["Source"] + "/blob/main/"  # For the role `source`.

# python -m sphinx -b linkcheck: what is ours is there only after it is published.
linkcheck_ignore = [f"{metadata['urls']['Source']}.*", f"{metadata['urls']['Documentation']}.*"]
