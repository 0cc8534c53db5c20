"""Every exception of dbf_compile: what was got, what is allowed, what to do.

DBFError
├── SignsError              a sign matrix or its packed words are not what they should be
├── FactorsError            the five tensors of a double binary factorization do not fit together
├── WeightError             a dense weight or its importance cannot be factored
├── CheckpointError         a file is not a readable checkpoint of this library
├── OptionError             an option is unknown, or its value is of the wrong type or range
├── ResumeError             an interrupted compression cannot be gone on with
├── ConversionError         a model cannot be converted as asked
├── TrainingError           a gradient is wanted for a weight that exists only in factored form
├── GraphInvariantError     a pass produced, or was given, an illegal graph
├── KernelInputError        an operator was called with tensors it cannot take
└── BuildError              the C++ kernels could not be built
"""

from __future__ import annotations


class DBFError(Exception):
    """Base of all errors raised on purpose by dbf_compile.

    The message reads ``<got>; allowed: <allowed>; <do>``.

    Args:
        got: what was found, with the offending value and the name of its place.
        allowed: what would have been accepted.
        do: the next step for the user, as an imperative.
    """

    def __init__(self, got: str, allowed: str, do: str) -> None:
        super().__init__(got, allowed, do)
        self.got, self.allowed, self.do = got, allowed, do

    def __str__(self) -> str:
        return f"{self.got}; allowed: {self.allowed}; {self.do}"

    def inside(self, context: str) -> DBFError:
        """Return the same error with the caller's context, such as a layer name, put in front."""
        return type(self)(f"{context}: {self.got}", self.allowed, self.do)


class SignsError(DBFError, ValueError):
    """A sign matrix or its packed words are not what they should be."""


class FactorsError(DBFError, ValueError):
    """The five tensors of a double binary factorization do not fit together."""


class WeightError(DBFError, ValueError):
    """A dense weight or its importance cannot be factored."""


class CheckpointError(DBFError, ValueError):
    """A file is not a readable checkpoint of this library."""


class OptionError(DBFError, ValueError):
    """An option is unknown, or its value is of the wrong type or range."""


class ResumeError(DBFError, RuntimeError):
    """An interrupted compression cannot be gone on with."""


class ConversionError(DBFError, ValueError):
    """A model cannot be converted as asked."""


class TrainingError(DBFError, RuntimeError):
    """A gradient is wanted for a weight that exists only in factored form."""


class GraphInvariantError(DBFError, RuntimeError):
    """A pass produced, or was given, an illegal graph."""


class KernelInputError(DBFError, ValueError):
    """An operator was called with tensors it cannot take."""


class BuildError(DBFError, RuntimeError):
    """The C++ kernels could not be built."""
