"""Keeps transformers from talking over lorakit's own output."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

from transformers.utils import logging as chatter


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and nothing below an error from transformers, in this block only."""
    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.ERROR)
    chatter.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF loader draws a bar past the switch
            yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()
