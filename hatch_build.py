"""Write what a package index shows: README with links that lead somewhere from there, the project's pages."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class CustomMetadataHook(MetadataHookInterface):
    """Read `home` of `[tool.hatch.metadata.hooks.custom]` in pyproject.toml, which alone names the repository."""

    def update(self, metadata: dict) -> None:
        """Lead README's links and pictures to the release in the repository; without an address, keep their text."""
        home, tag = self.config["home"].rstrip("/"), f"v{metadata['version']}"

        def lead(match: re.Match) -> str:
            mark, text, target = match.groups()
            if not home:
                return "" if mark else text
            return f"{mark}[{text}]({home}/{'raw' if mark else 'blob'}/{tag}/{target})"

        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        relative = r"(!?)\[([^\]\n]+)\]\((?!\w+:|#)([^)\s]+)\)"
        metadata["readme"] = {"content-type": "text/markdown", "text": re.sub(relative, lead, readme)}
        pages = {
            "Homepage": home,
            "Documentation": f"{home}/blob/{tag}/docs/index.md",
            "Changelog": f"{home}/blob/{tag}/CHANGELOG.md",
            "Issues": f"{home}/issues",
        }
        metadata["urls"] = pages if home else {}
