"""Texts of five kinds for bench_llm: what is calibrated with, and what is judged with; they never overlap.

    python benchmarks/llm_texts.py           where each text comes from, and how long it is
    python benchmarks/llm_texts.py FOLDER    and write what may be trained with, a file a kind

| kind | judged with | calibrated with |
|---|---|---|
| encyclopedia | WikiText-2, validation: the last third | "wikitext": its first two thirds; "mixture": articles of Wikipedia |
| web | pages of C4: the last tenth | the others |
| stories | TinyStories, validation, and a chapter of a novel, in turns | other books |
| code | twelve modules of Python's standard library | others of its modules |
| dialogues | written by hand for this benchmark: llm_dialogues.json | conversations that SmolLM2 has written itself |

End to end a model is trained with the mixture as well, of code with all modules of the standard library but the judged ones.

No ten words in a row of the last third of WikiText-2 occur in the other files, and none of TinyStories in the books. Of the
judged pages of C4 33 rows of ten words do, all in one list of wallpapers.

The files lie in ../shared/data/text (its README has origins and licences). Where they do not, web pages are the project pages of
the installed packages, and encyclopedia and stories are left out; bench_llm.py --text kind=path gives others.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

SHARED = Path(__file__).parents[2] / "shared" / "data" / "text"
DIALOGUES = Path(__file__).with_name("llm_dialogues.json")
OWN_CONVERSATIONS = Path(__file__).with_name("smollm2_text.json")
WIKITEXT_SHARE, WEB_SHARE, CHAPTER = 2 / 3, 0.9, (0.25, 0.28)
TURN = 6000  # characters of a text after which another one has its turn
JUDGED_MODULES = [
    "argparse",
    "calendar",
    "csv",
    "difflib",
    "fractions",
    "gettext",
    "heapq",
    "imaplib",
    "optparse",
    "shelve",
    "statistics",
    "zipapp",
]
CALIBRATED_MODULES = [
    "ast",
    "bisect",
    "cmd",
    "codeop",
    "configparser",
    "copy",
    "dis",
    "filecmp",
    "ftplib",
    "glob",
    "graphlib",
    "inspect",
    "ipaddress",
    "mailbox",
    "nntplib",
    "pickletools",
    "plistlib",
    "queue",
    "random",
    "sched",
    "shlex",
    "smtplib",
    "socketserver",
    "tarfile",
    "textwrap",
    "tokenize",
    "turtle",
    "uuid",
    "wave",
]


class Text(NamedTuple):
    """A text of one kind: what :func:`dbf_compile.token_batches` reads, and where it comes from."""

    source: list[Any]
    origin: str

    @property
    def characters(self) -> int:
        return sum(len(one) if isinstance(one, str) else len(json.dumps(one)) for one in self.source)


def judged() -> dict[str, Text]:
    """Return a text of every kind that is at hand, to judge with."""
    return _at_hand(
        {
            "encyclopedia": lambda: Text(
                [_part("wikitext2-valid", WIKITEXT_SHARE, 1)], "WikiText-2, validation, last third"
            ),
            "web": _judged_web,
            "stories": lambda: Text(
                _in_turns(_part("tinystories-valid-a", 0, 1), _part("books-sample", *CHAPTER)),
                "TinyStories, validation, and W. H. Ainsworth's Jack Sheppard, a chapter, in turns",
            ),
            "code": lambda: _modules(JUDGED_MODULES),
            "dialogues": lambda: Text(
                [{"messages": one} for one in json.loads(DIALOGUES.read_text(encoding="utf-8"))],
                "written by hand for this benchmark",
            ),
        }
    )


def wikitext() -> dict[str, Text]:
    """Return one kind alone to calibrate with: the first two thirds of WikiText-2's validation split."""
    text = Text([_part("wikitext2-valid", 0, WIKITEXT_SHARE)], "WikiText-2, validation, first two thirds")
    return {"encyclopedia": text}


def mixture() -> dict[str, Text]:
    """Return a text of every kind that is at hand, to calibrate with."""
    return _at_hand(
        {
            "encyclopedia": lambda: Text([_part("wikipedia-sample", 0, 1)], "articles of Wikipedia"),
            "web": lambda: Text([_part("web-sample", 0, WEB_SHARE)], "pages of C4, first nine tenths"),
            "stories": lambda: Text(
                _in_turns(_part("books-sample", CHAPTER[1], 1), _part("books-sample", 0, CHAPTER[0])),
                "five books of Project Gutenberg",
            ),
            "code": lambda: _modules(CALIBRATED_MODULES),
            "dialogues": lambda: Text(
                json.loads(OWN_CONVERSATIONS.read_text(encoding="utf-8")), "written by SmolLM2 itself"
            ),
        }
    )


def training() -> dict[str, Text]:
    """Return a text of every kind that is at hand, to train with end to end: the mixture with more code."""
    names = sorted(path.stem for path in Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    return mixture() | {"code": _modules([name for name in names if name not in JUDGED_MODULES], 2 * TURN)}


def are_shared() -> bool:
    """Return whether the files lie beside the project."""
    return (SHARED / "wikitext2-valid.txt").exists()


def _at_hand(kinds: dict[str, Callable[[], Text]]) -> dict[str, Text]:
    texts = {}
    for kind, read in kinds.items():
        try:
            texts[kind] = read()
        except FileNotFoundError:
            continue
    return texts


def _part(name: str, low: float, high: float) -> str:
    """Return a share of a file, from one beginning of a line to another."""
    text = (SHARED / f"{name}.txt").read_text(encoding="utf-8")
    begin, end = (
        text.find("\n", int(share * len(text))) + 1 if 0 < share < 1 else int(share * len(text))
        for share in (low, high)
    )
    return text[begin:end]


def _in_turns(*texts: str) -> list[str]:
    """Return pieces of texts, one of each after the other, as long as the shortest lasts."""
    count = min(len(text) for text in texts) // TURN
    return [text[TURN * turn : TURN * (turn + 1)] for turn in range(count) for text in texts]


def _judged_web() -> Text:
    if are_shared():
        return Text([_part("web-sample", WEB_SHARE, 1)], "pages of C4, last tenth")
    pages = sorted(
        (one.metadata["Name"] or "", one.metadata.get_payload() or one.metadata.get("Description") or "")
        for one in distributions()
    )
    texts = [str(page)[:TURN] for _, page in pages if len(str(page)) > TURN]
    if not texts:
        raise FileNotFoundError
    return Text(texts, f"project pages of {len(texts)} installed packages")


def _modules(names: list[str], characters: int = TURN) -> Text:
    """Return the middle of modules of the standard library, as much of each; those that a version lacks are left out."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [folder / f"{name}.py" for name in names]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
    starts = [text.find("\n", max(0, (len(text) - characters) // 2)) + 1 for text in texts]
    pieces = [text[start : start + characters] for text, start in zip(texts, starts, strict=True)]
    version = ".".join(map(str, sys.version_info[:3]))
    return Text(pieces, f"standard library of Python {version}: {len(pieces)} modules")


def main() -> None:
    for title, texts in (
        ("judged", judged()),
        ("calibrated: mixture", mixture()),
        ("trained", training()),
    ):
        for kind, text in texts.items():
            print(f"{title:20} {kind:13} {text.characters:9,} characters  {text.origin}")
    if len(sys.argv) < 2:
        return
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for kind, text in training().items():
        (folder / f"{kind}.txt").write_text("\n\n".join(text.source), encoding="utf-8")


if __name__ == "__main__":
    main()
