"""The documentation as a site: `make docs` writes it to docs/_build; warnings are errors."""

import re
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "ssl_emp"
author = "the authors of ssl_emp"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "ssl_emp"
html_static_path: list[str] = []
html_show_sourcelink = False
myst_heading_anchors = 3  # links to headings are written as on GitHub: page.md#the-heading
suppress_warnings = ["myst.strikethrough"]
default_role = "literal"  # a single backtick in a docstring, as in Markdown
smartquotes = False  # --config is no dash
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

# pages that are a file of another folder, read from there
ELSEWHERE = {
    "experiments": ROOT / "experiments" / "README.md",
    "experiments_archive": ROOT / "experiments" / "archive.md",
    "benchmarks": ROOT / "benchmarks" / "README.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "changelog": ROOT / "CHANGELOG.md",
}
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    """A page as the site has it: pages are written for GitHub, where links lead to files of the clone."""
    folder = DOCS
    if name in ELSEWHERE:
        source[0], folder = ELSEWHERE[name].read_text(encoding="utf-8"), ELSEWHERE[name].parent

    def on_site(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        pages = {path: f"{page}.md" for page, path in ELSEWHERE.items()}
        if target in pages:
            return pages[target] + (link[2] or "")
        if target.is_relative_to(DOCS):
            return str(target.relative_to(DOCS)) + (link[2] or "")
        if target == ROOT / "README.md":
            return "index.md"
        return "../" + str(
            target.relative_to(ROOT)
        )  # a file of the repository: the site has a copy to download

    text = re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", lambda link: _without_folder(link, folder), source[0])
    source[0] = LINK.sub(on_site, text)


def _without_folder(link: re.Match[str], folder: Path) -> str:
    """A link to a folder of the repository is its name here: a site has no listing of it."""
    return link[1] if (folder / link[2]).is_dir() else link[0]


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_page)
