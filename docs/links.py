"""A hook of mkdocs.yml: the notebook lies in examples/ and links to ../docs/page.md; on the site, to that page."""

import re

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url


def on_page_content(html: str, page: Page, files: Files, **_: object) -> str:
    """HTML of a page -> the same with the notebook's links led to the pages."""

    def lead(match: re.Match[str]) -> str:
        target = files.get_file_from_path(match[1])
        if target is None:
            raise PluginError(f"{page.file.src_uri}: expected a page of docs/, got a link to {match[1]}. Correct it.")
        return f'href="{get_relative_url(target.url, page.url)}'

    return re.sub(r'href="\.\./docs/([^"#]+)', lead, html) if page.file.src_uri.endswith(".ipynb") else html
