"""Docstrings name other objects as ``:func:`~package.name```; on the site each is a link, where its page is there."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`(~?)([\w.]+)`")


def _link(match: re.Match[str]) -> str:
    target = match[2]
    shown = target.rpartition(".")[2] if match[1] else target
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'


def plain(text: str) -> str:
    """Return a docstring in which nothing is taken for Markdown or for a name: invisible spaces keep marks apart.

    ``E[x xᵀ] [K, K]`` is no link, and what stands before the colon of a dictionary in code is no type.
    """
    text = re.sub(r"``[^`]+``", lambda match: match[0].replace(": ", ":\u200b "), text)
    return text.replace("] [", "]\u200b [").replace("][", "]\u200b[")


class Roles(Extension):
    """Turns the roles of docstrings into links that may lead nowhere."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, plain(obj.docstring.value))
