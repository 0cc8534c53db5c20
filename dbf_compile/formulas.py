"""What a linear layer costs, as formulas: bits and bytes that are stored, operations and table look-ups for one token.

| symbol | meaning |
|---|---|
| K | in_features |
| R | mid_features |
| N | out_features |
| G | scales of a row, in a table of quantized rows |
| H, D, T | heads of attention, features of a head, tokens of the context |
| ⌈n / 32⌉ | 32-bit words that hold a row of n signs |

Every formula stands here once. Called with whole numbers, it gives a whole number:
``factored_bits(4096, 2016, 4096)``. Its ``expression`` is the same as an expression of sympy, to differentiate, solve
or print. Biases are not counted: a factored layer keeps that of the dense one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any


class Formula:
    """A formula of the sizes of a layer.

    Args:
        symbols: the sizes that it depends on, in the order in which a call takes them, such as ``"K R N"``.
        text: in sympy's notation, with integer coefficients once it is expanded.
        **terms: other formulas that ``text`` mentions, by name.
    """

    def __init__(self, symbols: str, text: str, **terms: Formula) -> None:
        self.symbols = tuple(symbols.split())
        self._text, self._terms = text, terms

    def __call__(self, *sizes: int) -> int:
        """Return the value for whole numbers, exactly."""
        return self._function(*sizes)

    @cached_property
    def expression(self) -> Any:
        """The expanded expression of sympy; its symbols are positive integers."""
        import sympy  # type: ignore[import-untyped]

        symbols = dict.fromkeys((*"KRN", *self.symbols))
        names: dict[str, Any] = {name: sympy.Symbol(name, integer=True, positive=True) for name in symbols}
        names |= {name: formula.expression for name, formula in self._terms.items()}
        return sympy.expand(sympy.sympify(self._text, locals=names))

    @cached_property
    def _function(self) -> Callable[..., int]:
        from sympy import gcd_terms, lambdify
        from sympy.printing.pycode import PythonCodePrinter  # type: ignore[import-untyped]

        class Exact(PythonCodePrinter):  # type: ignore[misc]
            def _print_ceiling(self, ceiling: Any) -> str:
                # math.ceil would divide in floating point.
                numerator, denominator = ceiling.args[0].as_numer_denom()
                return f"(-(-({self._print(numerator)}) // {self._print(denominator)}))"

        printer = Exact({"fully_qualified_modules": False})
        function: Callable[..., int] = lambdify(self.symbols, gcd_terms(self.expression), printer=printer)
        return function


# 32-bit words of signs, and scales of 16 bits: what ``factorize`` makes.
sign_words = Formula("K R N", "R*ceiling(K/32) + N*ceiling(R/32)")
factored_bits = Formula("K R N", "32*sign_words + 16*(K + R + N)", sign_words=sign_words)
factored_bytes = Formula("K R N", "factored_bits/8", factored_bits=factored_bits)
onebit_bits = Formula("K N", "32*N*ceiling(K/32) + 16*(K + N)")
dense_bits = Formula("K N", "16*N*K")  # float16 or bfloat16
dense_bytes = Formula("K N", "dense_bits/8", dense_bits=dense_bits)

# One token through a factored layer: a sign negates, which costs neither an addition nor a multiplication.
factored_additions = Formula("K R N", "R*(K - 1) + N*(R - 1)")
factored_multiplications = Formula("K R N", "K + R + N")
# The kernels replace four additions by the look-up of a sum of four and one addition; they read whole words.
factored_lookups = Formula("K R N", "8*sign_words", sign_words=sign_words)
# A look-up table (LUT): 8 sums of two columns and 16 of four, for each of the 8 fours of a word.
lut_additions = Formula("K", "8*(8 + 16)*ceiling(K/32)")
# What the kernels add with look-ups: the tables of both stages, then what is looked up for each row.
lookup_additions = Formula(
    "K R N", "192*(ceiling(K/32) + ceiling(R/32)) + lookups - R - N", lookups=factored_lookups
)
dense_additions = Formula("K N", "N*(K - 1)")
dense_multiplications = Formula("K N", "N*K")

# One token through a table of quantized rows: codes are multiplied and added up, and each group's sum is scaled.
rows_additions = Formula("K N G", "N*(K - 1)")
rows_multiplications = Formula("K N G", "N*(K + G)")
row_reading_multiplications = Formula("K", "K")  # of an embedding: every code by its scale

# Attention of one layer: one token's products with the keys and the values of all T tokens. The softmax is not counted.
attention_additions = Formula("H D T", "H*(T*(D - 1) + D*(T - 1))")
attention_multiplications = Formula("H D T", "2*H*D*T")
