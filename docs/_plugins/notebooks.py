"""Have mkdocs offer pages as notebooks: those listed in ``extra.notebooks`` of mkdocs.yml."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

import jupytext
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

LINK_WITHIN_THE_SITE = re.compile(r"!?\[([^\]]*)\]\((?![a-z]+:)[^)]*\)")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def on_files(files: Any, config: Any) -> Any:
    """Add a notebook for each listed page; mkdocs calls this."""
    for page in config.extra["notebooks"]:
        source = files.get_file_from_path(page)
        if source is None:
            raise PluginError(f"mkdocs.yml, extra.notebooks: there is no page {page!r}")
        files.append(File.generated(config, notebook_of(page), content=as_notebook(source.content_string)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Link the notebook below the title of its page; mkdocs calls this."""
    if page.file.src_uri not in config.extra["notebooks"]:
        return markdown
    title, rest = markdown.split("\n", 1)
    name = PurePosixPath(notebook_of(page.file.src_uri)).name
    return f"{title}\n\n[Download this page as a notebook]({name}){{ download }}\n{rest}"


def notebook_of(page: str) -> str:
    """Return the path of a page's notebook, beside it."""
    return str(PurePosixPath(page).with_suffix(".ipynb"))


def as_notebook(markdown: str) -> str:
    """Return a page as a notebook, in JSON: a cell for each block of Python, and the text between them.

    Links to other pages become plain text, since a downloaded notebook stands alone.
    """
    notebook = jupytext.reads(markdown, fmt="md")
    for place, cell in enumerate(notebook.cells):
        cell.id = str(place)
        if cell.cell_type == "markdown":
            cell.source = LINK_WITHIN_THE_SITE.sub(r"\1", cell.source)
    notebook.metadata = {"kernelspec": KERNEL}
    return str(jupytext.writes(notebook, fmt="ipynb"))
