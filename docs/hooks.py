"""What the site needs to know of the pages, given to mkdocs. What lives here: pages that are files of the repository,
and links that lead out of docs/. What must not: any text of a page.

The pages are read on GitHub as well, so their links are those of the repository. On the site a link to a file beside
docs/ that is a page leads to that page. Any other one leads into the repository if mkdocs.yml has its address as
``repo_url``, and is the path of the file otherwise.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security-policy.md", "CHANGELOG.md": "changelog.md"}
"""Files beside docs/ that are pages of the site."""
SAME = PAGES | {"README.md": "index.md"}
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File  # noqa: PLC0415 - the links are tested where it is not installed

    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    beside = {page: source for source, page in PAGES.items()}
    here = beside.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return links_of_the_site(markdown, here, config.repo_url)


def links_of_the_site(markdown: str, here: str, repo_url: str | None) -> str:
    """A page with its links as the site needs them; `here` is its path in the repository."""

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if ":" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if path in SAME:
            return f"[{text}]({SAME[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({posixpath.relpath(path, 'docs')}{anchor})"
        if not (ROOT / path).exists():
            return found[0]  # which mkdocs reports
        if repo_url:
            return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        name = text.strip("`")
        return f"`{path}`" if path.endswith(name) else f"{text} (`{path}`)"

    done, end = [], 0
    for fence in FENCE.finditer(markdown):
        done += [LINK.sub(link, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*done, LINK.sub(link, markdown[end:])])
