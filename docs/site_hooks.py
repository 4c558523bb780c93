"""What makes the site of the repository (a hook of mkdocs, see mkdocs.yml): pages and pictures from outside of docs/, links, formulas.

The site mirrors the repository: README.md is its home, a page of docs/ stands at its own path under docs/, anything else at its path in the
repository. Links are written as they are right in the repository, and turned into the site's here; one to a file that is no part of the
site leads to the repository, where its address is known, and is plain text elsewhere.
"""

from __future__ import annotations

import html
import os
import re
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "bench/*.md", "bench/results/**/*.md", "train/results/*.md")
PICTURES = ("bench/results/**/*.png", "train/results/*.png")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r'(<img [^>]*src="([^"]+)"[^>]*>)')
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def place(path: Path) -> str:
    """Where a file of the repository stands among the site's sources."""
    inside = path.relative_to(ROOT).as_posix()
    return "index.md" if inside == "README.md" else inside.removeprefix("docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in CARRIED + PICTURES:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = Path(page.file.abs_src_path or "")

    def link(found: re.Match) -> str:
        picture, text, target, anchor = found.groups(default="")
        if "://" in target:
            return found[0]
        path = Path(os.path.normpath(source.parent / target))
        if not path.exists() or not path.is_relative_to(ROOT):
            return found[0]  # which mkdocs reports
        if files.get_file_from_path(place(path)) is not None:
            to = os.path.relpath(place(path), PurePosixPath(page.file.src_uri).parent)
            return f"{picture}[{text}]({Path(to).as_posix()}{anchor})"
        if config.repo_url:
            return f"[{text}]({config.repo_url}/blob/main/{path.relative_to(ROOT).as_posix()}{anchor})"
        return text

    parts = CODE.split(markdown)
    return "".join(part if n % 2 else LINK.sub(link, part) for n, part in enumerate(parts))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers draw by themselves: no script, and no other server is asked. Pictures link to themselves."""

    def mathml(found: re.Match) -> str:
        return convert(html.unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline")

    return PICTURE.sub(r'<a href="\2">\1</a>', FORMULA.sub(mathml, content))
