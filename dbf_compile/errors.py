"""Every exception of dbf_compile: what was got, what is allowed, what to do.

DBFError
├── SignsError              a sign matrix or its packed words are malformed
├── FactorsError            the five tensors of a double binary factorization do not fit together
├── WeightError             a dense weight or its importance cannot be factored
├── CheckpointError         a file is not a readable checkpoint of this library
├── OptionError             an option is unknown, or its value is of the wrong type or range
├── ResumeError             an interrupted compression cannot be resumed
├── ConversionError         a model cannot be converted as asked
├── TrainingError           a gradient is requested of what exists only in factored form, or a loss is not finite
├── GraphInvariantError     a pass produced or received an illegal graph
├── KernelInputError        an operator was called with tensors that it does not accept
└── BuildError              the C++ kernels could not be built
"""

from __future__ import annotations


class DBFError(Exception):
    """Base class of all errors that dbf_compile raises on purpose.

    The message reads ``<got>; allowed: <allowed>; <do>``.

    Args:
        got: the offending value, with the name of its place.
        allowed: what would have been accepted.
        do: the next step for the user, in the imperative.
    """

    def __init__(self, got: str, allowed: str, do: str) -> None:
        super().__init__(got, allowed, do)
        self.got, self.allowed, self.do = got, allowed, do

    def __str__(self) -> str:
        return f"{self.got}; allowed: {self.allowed}; {self.do}"

    def inside(self, context: str) -> DBFError:
        """Return the same error with a context, such as a layer name, in front of its message."""
        return type(self)(f"{context}: {self.got}", self.allowed, self.do)


class SignsError(DBFError, ValueError):
    """A sign matrix or its packed words are malformed."""


class FactorsError(DBFError, ValueError):
    """The five tensors of a double binary factorization do not fit together."""


class WeightError(DBFError, ValueError):
    """A dense weight or its importance cannot be factored."""


class CheckpointError(DBFError, ValueError):
    """A file is not a readable checkpoint of this library."""


class OptionError(DBFError, ValueError):
    """An option is unknown, or its value is of the wrong type or range."""


class ResumeError(DBFError, RuntimeError):
    """An interrupted compression cannot be resumed."""


class ConversionError(DBFError, ValueError):
    """A model cannot be converted as asked."""


class TrainingError(DBFError, RuntimeError):
    """A gradient is requested for a weight that exists only in factored form, or a loss is not finite."""


class GraphInvariantError(DBFError, RuntimeError):
    """A pass produced or received an illegal graph."""


class KernelInputError(DBFError, ValueError):
    """An operator was called with tensors that it does not accept."""


class BuildError(DBFError, RuntimeError):
    """The C++ kernels could not be built."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
