"""The Sphinx site of these pages, which are plain Markdown that reads well without it, too.

What only a site needs is made here from the pages: the navigation, and an answer to links that leave the folder.
"""

import re
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent

project = "seitpp"
author = copyright = "The seitpp developers"
release = metadata.version("seitpp")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"seitpp {release}"

myst_heading_anchors = 3  # the anchors of headings are those of GitHub
default_role = "code"  # docstrings put names in single backticks
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # a constant by its name, as in the source

# A page of examples is executed once, and again when a cell of it changes; an error in it ends the build.
nb_execution_mode = "cache"
nb_execution_in_temp = True  # what a page writes is gone with it
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars, and what libraries say about the notebook

GROUP = re.compile(r"^## (.+)\n\n((?:- \[.+\]\(.+\.md\): .+\n(?:  .+\n)*)+)", re.MULTILINE)
ENTRY = re.compile(r"- \[(.+)\]\((.+)\.md\): ((?:.+\n)(?:  .+\n)*)")
LINK_OUT = re.compile(r"\[([^]\n]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)]*)?\)")


def navigation(group: re.Match) -> str:
    """Return a group of the list of pages in index.md as cards and as a part of the navigation."""
    title, entries = group[1], ENTRY.findall(group[2])
    cards = [
        f"```{{grid-item-card}} {name}\n:link: {page}\n:link-type: doc\n\n{text}```\n"
        for name, page, text in entries
    ]
    pages = "".join(f"{page}\n" for _, page, _ in entries)
    return (
        f"## {title}\n\n````{{grid}} 1 2 2 2\n:gutter: 3\n\n{''.join(cards)}````\n\n"
        f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n{pages}```\n"
    )


def link_out(link: re.Match, folder: Path) -> str:
    """Return a link that leaves this folder as a download of the file; of a folder, only its name stays."""
    text, target = link[1].strip("`"), (folder / link[2]).resolve()
    if target.is_relative_to(DOCS):
        return link[0]
    return f"{{download}}`{text} <{link[2]}>`" if target.is_file() else f"`{text}`"


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Change the text of a page before it is parsed."""
    folder = (DOCS / name).parent
    text = LINK_OUT.sub(lambda link: link_out(link, folder), source[0])
    source[0] = GROUP.sub(navigation, text) if name == "index" else text


def keep_tables(app: Sphinx, what: str, name: str, item: object, options: object, lines: list[str]) -> None:
    """Show a table of a docstring as it is written."""
    if any(line.startswith("|") for line in lines):
        first = next(number for number, line in enumerate(lines) if line.startswith("|"))
        lines[first:] = ["::", "", *(f"    {line}" if line.startswith("|") else line for line in lines[first:])]


def setup(app: Sphinx) -> None:
    """Connect the functions of this file; Sphinx calls it."""
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", keep_tables)
