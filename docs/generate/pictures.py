"""Draws the pictures of the documents: ``python docs/generate/pictures.py`` writes ``docs/pictures/*.svg``.

They are files, not parts of pages, so that the README shows one as well. All are narrow enough to be read on a phone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "pictures"

INK, PALE, PAPER, LINE = "#1d2433", "#5b6475", "#ffffff", "#c9ced8"
BLUE, AMBER, GREEN, GREY = "#2f5fb3", "#c9781f", "#2e8b6f", "#eef1f6"
STEP = 12  # side of a square of a matrix


class Drawing:
    """SVG, element by element."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" font-family="system-ui, -apple-system, Segoe UI, sans-serif">',
            f"<title>{title}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{PALE}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="10" fill="{PAPER}"/>',
        ]

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        fill: str = INK,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """Write a line of text; y is its baseline."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{_escaped(text)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, fill: str = GREY, stroke: str = LINE
    ) -> None:
        """Draw a rounded box."""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{stroke}"/>'
        )

    def square(self, x: float, y: float, fill: str, width: float = STEP, height: float = STEP) -> None:
        """Draw one entry of a matrix."""
        self._parts.append(f'<rect x="{x}" y="{y}" width="{width - 1}" height="{height - 1}" fill="{fill}"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw an arrow through points."""
        path = "L".join(f"{x} {y}" for x, y in points)
        self._parts.append(
            f'<path d="M{path}" fill="none" stroke="{PALE}" stroke-width="1.5" marker-end="url(#head)"/>'
        )

    def done(self) -> str:
        """Return the file."""
        return "\n".join([*self._parts, "</svg>"]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _grey(value: float) -> str:
    level = round(245 - 190 * value)
    return f"#{level:02x}{level:02x}{min(255, level + 10):02x}"


def factorization() -> str:
    """W ≈ a · A · m · B · b, and where it goes."""
    chance = random.Random(3)
    rows, columns, middle, top = 8, 8, 5, 76
    picture = Drawing(480, 372, "A weight becomes two sign matrices and three scale vectors")
    picture.text(240, 30, "W  ≈  diag(a) · A · diag(m) · B · diag(b)", size=18, bold=True)
    outer = [[chance.choice((-1, 1)) for _ in range(middle)] for _ in range(rows)]
    inner = [[chance.choice((-1, 1)) for _ in range(columns)] for _ in range(middle)]
    a, m, b = ([0.3 + 0.7 * chance.random() for _ in range(size)] for size in (rows, middle, columns))

    def vector(x: float, y: float, values: Sequence[float], down: bool) -> None:
        for index, value in enumerate(values):
            place = (x, y + index * STEP) if down else (x + index * STEP, y)
            picture.square(*place, fill=AMBER if value > 0.75 else "#dfa45f" if value > 0.5 else "#f0d0a8")

    def matrix(x: float, y: float, values: Sequence[Sequence[int]]) -> None:
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                picture.square(x + j * STEP, y + i * STEP, BLUE if value > 0 else "#dbe5f6")

    for i in range(rows):
        for j in range(columns):
            total = a[i] * b[j] * sum(outer[i][r] * m[r] * inner[r][j] for r in range(middle))
            picture.square(28 + j * STEP, top + i * STEP, _grey(min(1.0, abs(total) / 1.6)))
    picture.text(76, top - 10, "W  [N, K]", size=13, fill=PALE)
    picture.text(76, top + 118, "16 or 32 bits each", size=13, fill=PALE)
    picture.text(150, top + 54, "≈", size=26)
    vector(176, top, a, down=True)
    matrix(206, top, outer)
    vector(284, top + 18, m, down=True)
    matrix(314, top + 18, inner)
    vector(314, top + 92, b, down=False)
    for x, y, label in (
        (181, -10, "a"),
        (236, -10, "A  [N, R]"),
        (289, 6, "m"),
        (364, 6, "B  [R, K]"),
        (424, 101, "b"),
    ):
        picture.text(x, top + y, label, size=13, fill=PALE)
    picture.text(305, top + 130, "signs: 1 bit each · scales: three vectors", size=13, fill=PALE)
    for x, colour, title, below in (
        (12, GREY, "dense model", "nn.Linear, Conv1D"),
        (176, "#e6f1ec", "factors", "a file, or a folder"),
        (340, "#e8eefa", "compiled model", "look-ups, additions"),
    ):
        picture.box(x, 256, 128, 60, colour)
        picture.text(x + 64, 281, title, size=13, bold=True)
        picture.text(x + 64, 302, below, size=12, fill=PALE)
    picture.arrow((142, 286), (174, 286))
    picture.arrow((306, 286), (338, 286))
    picture.text(240, 346, "R sets the size: from half a bit to several bits a weight", size=14)
    return picture.done()


def _flow(title: str, steps: Sequence[tuple[str, str, str, str]]) -> str:
    """Draw steps from top to bottom.

    Args:
        title: of the picture.
        steps: name, what it is, what it is made of or does, and the colour of its box.
    """
    height = 12 + 78 * len(steps)
    picture = Drawing(400, height, title)
    for index, (name, what, more, colour) in enumerate(steps):
        y = 12 + 78 * index
        picture.box(20, y, 360, 56, colour)
        picture.text(34, y + 22, name, size=15, anchor="start", bold=True)
        picture.text(366, y + 22, what, size=13, anchor="end", fill=PALE)
        picture.text(34, y + 43, more, size=13, anchor="start", fill=PALE)
        if index + 1 < len(steps):
            picture.arrow((200, y + 57), (200, y + 77))
    return picture.done()


_CODE, _DATA, _END = "#e8eefa", GREY, "#e6f1ec"


def weight() -> str:
    """The way of one weight."""
    return _flow(
        "The way of one weight",
        (
            ("weight [N, K]", "nn.Linear, Conv1D", "and batches of text or of any other input", _DATA),
            ("calibrate", "Importance", "second moments of inputs and of output gradients", _CODE),
            ("allocate", "Allocation", "the middle dimension R of every weight (optional)", _CODE),
            (
                "factorize",
                "ADMM, then refinement",
                "two sign matrices and three scales, error weighted",
                _CODE,
            ),
            ("DoubleBinaryFactors", "five tensors", "1 bit a sign, 16 bits a scale", _END),
            (
                "file, folder, layer",
                "save, compress, convert_",
                "safetensors, transformers, DoubleBinaryLinear",
                _END,
            ),
        ),
    )


def graph() -> str:
    """The way of one graph."""
    return _flow(
        "The way of one graph",
        (
            ("torch.compile", 'backend="dbf"', "Dynamo captures a graph of the model", _DATA),
            ("find, merge, replace", "PIPELINE", "linear layers become pairs of sign products", _CODE),
            ("AOTAutograd, Inductor", "torch", "functional graph, decompositions, fusion", _DATA),
            (
                "fuse, group, narrow",
                "POST_GRAD_PIPELINE",
                "one call a layer on a CPU, fewer launches on a GPU",
                _CODE,
            ),
            (
                "lowerings",
                "the door to the kernels",
                "a library call on a CPU, a Triton template on a GPU",
                _CODE,
            ),
            ("compiled graph", "checked at each call", "another or a changed weight is noticed", _END),
        ),
    )


def model() -> str:
    """The way of one model."""
    return _flow(
        "The way of one model",
        (
            ("folder of a model", "or a name on the Hub", "opened without being read", _DATA),
            ("statistics", "once", "second moments of all layers", _CODE),
            ("budget", "optional", "a middle dimension for every weight", _CODE),
            (
                "blocks, in sequence",
                "or each weight alone",
                "tune · factor · refine, from the compressed prefix",
                _CODE,
            ),
            ("distill", "scales only", "scales learn the logits of the dense model", _CODE),
            ("judge, write", "held-out windows", "KL, top-1 agreement, a report as an HTML page", _CODE),
            ("folder for from_pretrained", "as any other", "appears whole, or not at all", _END),
        ),
    )


def lookup() -> str:
    """Four additions are one look-up."""
    picture = Drawing(400, 330, "Sums of four activations are looked up by four signs")
    picture.text(200, 28, "once for each token", size=14, fill=PALE)
    for index in range(4):
        picture.box(52 + 76 * index, 42, 68, 32, "#f8e7d2", AMBER)
        picture.text(86 + 76 * index, 63, f"x{'₀₁₂₃'[index]}", size=16)
    picture.arrow((200, 76), (200, 98))
    for index in range(16):
        picture.box(24 + 22 * index, 102, 20, 30, "#e8eefa" if index != 5 else BLUE)
    picture.text(200, 152, "table: the 16 sums ±x₀ ± x₁ ± x₂ ± x₃", size=14)
    picture.text(200, 190, "then for every row of signs", size=14, fill=PALE)
    for index, sign in enumerate("+−+−"):
        picture.box(52 + 76 * index, 202, 68, 32, "#dbe5f6" if sign == "−" else BLUE)
        picture.text(86 + 76 * index, 223, sign, size=16, fill=INK if sign == "−" else PAPER)
    picture.text(200, 258, "bits 1 0 1 0, lowest first: entry 5", size=14)
    picture.text(200, 292, "y += table[5]", size=16, bold=True)
    picture.text(200, 316, "one look-up and one addition for four signs", size=13, fill=PALE)
    return picture.done()


PICTURES = {draw.__name__: draw for draw in (factorization, weight, graph, model, lookup)}


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
