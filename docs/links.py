"""A hook of mkdocs.yml: what a page cannot say as a file, since it is read elsewhere, too.

The notebook lies in examples/ and links to ../docs/page.md; on the site, to that page. A class of a loss that is the
first cell of a row leads to its entry on the page of the API. An option of a command is one word.
"""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

LOSSES = Path(__file__).parent.parent / "src" / "softdice" / "losses"
ENTRIES = {
    name: f"softdice.losses.{module.stem}.{name}"
    for module in sorted(LOSSES.glob("[!_]*.py"))
    for name in re.findall(r"^class (\w+Loss)\(", module.read_text(encoding="utf-8"), re.MULTILINE)
    if not name.startswith("_")
}
"""Class of a loss -> its anchor on the page of the API."""


def on_page_content(html: str, page: Page, files: Files, **_: object) -> str:
    """Return the HTML of a page with its links."""

    def url(path: str) -> str:
        target = files.get_file_from_path(path)
        if target is None:
            raise PluginError(f"{page.file.src_uri}: expected a page of docs/, got a link to {path}. Correct it.")
        return get_relative_url(target.url, page.url)

    def entry(match: re.Match[str]) -> str:
        anchor = ENTRIES.get(match[2])
        return f'{match[1]}<a href="{url("api.md")}#{anchor}">{match[3]}</a>' if anchor else match[0]

    html = re.sub(r"<code>(?=--[\w-]+(?: \w+)?</code>)", '<code class="option">', html)
    if page.file.src_uri.endswith(".ipynb"):
        return re.sub(r'href="\.\./docs/([^"#]+)', lambda match: f'href="{url(match[1])}', html)
    if page.file.src_uri == "losses.md":
        return re.sub(r"(<tr>\s*<td>)(?=<code>(\w+))(<code>[^<]*</code>)", entry, html)
    return html
