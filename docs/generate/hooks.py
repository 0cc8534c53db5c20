"""What mkdocs calls while it builds the site: generated tables, plots and the notes beside the measurements.

A page holds comments such as ``<!-- generate: options CompressionConfig -->``; each is replaced by what the function of that
name in ``GENERATORS`` returns. No table of the site is copied from the code or from a CSV file by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import command_tables
import llm_tables
import option_tables
import pass_tables
import result_tables
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"

GENERATORS: dict[str, Callable[..., str]] = {
    "options": option_tables.table,
    "aliases": option_tables.aliases,
    "extras": option_tables.extras,
    "command": command_tables.table,
    "passes": pass_tables.table,
    **result_tables.GENERATORS,
    **llm_tables.GENERATORS,
}
# Files outside of docs/ that are pages of the site, or pictures of them.
ELSEWHERE = {
    "results/factorizer.md": RESULTS / "factorizer.md",
    "results/gpu.md": RESULTS / "gpu.md",
    "results/factorizer_curves.png": RESULTS / "factorizer_curves.png",
    "results/cpu_layer.png": RESULTS / "cpu_layer.png",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "changelog.md": ROOT / "CHANGELOG.md",
}
_FETCHES = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]+')
_PLACE = re.compile(r"<!-- generate: (\w+)((?: [\w.-]+)*) -->")
# Links of these files lead to files of the repository; on the site some of them are pages.
_LINKS = {"](docs/": "](", "](benchmarks/results/": "](results/"}


def on_files(files: Files, config: object) -> Files:
    """Add the files that lie outside of the documents' folder."""
    for place, source in ELSEWHERE.items():
        files.append(File.generated(config, place, abs_src_path=str(source)))  # type: ignore[call-overload]
    return files


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """Fill in what is generated."""
    place = page.file.src_uri  # type: ignore[attr-defined]
    if place in ELSEWHERE:
        for link, target in _LINKS.items():
            markdown = markdown.replace(link, target)
    return _PLACE.sub(lambda match: GENERATORS[match[1]](*match[2].split()), markdown)


def on_post_build(config: dict[str, str], **_: object) -> None:
    """Refuse a site whose pages fetch something from elsewhere."""
    for path in Path(config["site_dir"]).rglob("*.html"):
        if match := _FETCHES.search(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path} fetches {match[0]}")
