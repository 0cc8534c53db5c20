"""A whole report of a compression, and readers of its page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

KINDS = ("self_attn.q_proj + self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


_HEAD = {"name": "lm_head", "bits_per_weight": 3.0, "error": None, "block": None}
_DISTILLATION = {
    "stage": "distill",
    "block": None,
    "measure": "KL",
    "before": 0.4,
    "after": 0.3,
    "seconds": 4000.0,
}


def _facts() -> dict[str, Any]:
    return {
        "dbf_compile": "0.1.0",
        "created": "2026-11-25T09:00:00+00:00",
        "model": {
            "name": "stories260K",
            "architecture": "LlamaForCausalLM",
            "parameters": 263232,
            "hash": "5e" * 32,
        },
        "data": {"source": "text.txt", "hash": "da" * 32, "windows": 64, "tokens": 32768},
        "settings": {"mode": "block", "skip": ["lm_head"], "overrides": {"*.down_proj": 2.5}, "seed": 1234},
        "bits": {"target": 2.0, "factored": 1.98, "file": 4.2},
        "coverage": {
            "share": 0.86,
            "dense": [
                {"name": "model.embed_tokens", "weights": 32768, "share": 0.124, "reason": "embedding"},
                {"name": "model.norm", "weights": 64, "share": 0.0002, "reason": "not a matrix"},
            ],
        },
        "evaluation": {
            "measure": "nats per token on 16 held-out windows",
            "dense": 1.213,
            "compressed": 1.434,
            "kl": 0.2,
            "top1_agreement": 0.83,
        },
        "operations": {
            "factored": {
                "additions": 500000,
                "lookups": 130000,
                "lookup_additions": 140000,
                "multiplications": 8000,
            },
            "dense": {
                "additions": 32256,
                "lookups": 0,
                "lookup_additions": 32256,
                "multiplications": 32768,
            },
            "total": {
                "additions": 532256,
                "lookups": 130000,
                "lookup_additions": 172256,
                "multiplications": 40768,
            },
            "dense_model": {
                "additions": 260000,
                "lookups": 0,
                "lookup_additions": 260000,
                "multiplications": 262144,
            },
            "experts": ["2 of 8"],
            "uncounted_weights": 64,
        },
        "time": {"calibrate": 3.0, "factor": 20.1, "total": 130.0},
        "memory": {"peak_bytes": 123456789},
        "machine": {"processor": "Xeon", "cores": 2, "torch": "2.13.0", "python": "3.11.7"},
    }


def report(blocks: int = 3) -> dict[str, Any]:
    """Return a whole report, with one more layer outside of the blocks."""
    layers = [
        {
            "name": " + ".join(f"model.layers.{block}.{part}" for part in kind.split(" + ")),
            "shape": [192, 64],
            "mid_features": 1080,
            "bits_per_weight": 1.9 + 0.1 * index,
            "error": 0.04 + 0.01 * index + 0.001 * block,
            "seconds": 1.2,
            "block": block,
        }
        for block in range(blocks)
        for index, kind in enumerate(KINDS)
    ]
    stages = [
        {
            "stage": "tune",
            "block": block,
            "measure": "error of the block's output",
            "before": 0.02,
            "after": 0.012,
        }
        for block in range(blocks)
    ]
    content = {**_facts(), "layers": [*layers, _HEAD], "stages": [*stages, _DISTILLATION]}
    return json.loads(json.dumps(content))


class Page(HTMLParser):
    """The words of a page, its attributes, and whether every tag is closed where it should be."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()} closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def charts(page: str) -> list[ElementTree.Element]:
    drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    return [svg for svg in drawn if svg.get("role") == "img"]
