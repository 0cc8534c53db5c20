"""The progress bars of other libraries: shown or silent together with ours."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr


@contextmanager
def bars_of_transformers(shown: bool) -> Iterator[None]:
    """Silence the bars of transformers and of the Hub inside the block, unless they are to be shown."""
    if shown:
        yield
        return
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextmanager
def bars_of_lm_eval(shown: bool) -> Iterator[None]:
    """Silence the bars of lm-eval inside the block, unless they are to be shown; it has no switch for them."""
    with nullcontext() if shown else redirect_stderr(io.StringIO()):
        yield


@contextmanager
def bars_of_gguf() -> Iterator[None]:
    """Silence the bar with which transformers dequantizes, unless its bars are shown; it has no switch for this one."""
    from transformers.utils import logging

    with nullcontext() if logging.is_progress_bar_enabled() else redirect_stderr(io.StringIO()):
        yield
