"""The entry point ``vllm.general_plugins``: vLLM calls it in every process, whatever model is served."""

from __future__ import annotations

import logging

from dbf_compile.integrations.content import METHOD

_log = logging.getLogger(__name__)


def register() -> None:
    """Tell vLLM of the method "dbf". A second call changes nothing; a vLLM that it does not fit is left as it is, with a warning."""
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from dbf_compile.integrations.vllm.config import VLLMConfig

        register_quantization_config(METHOD)(VLLMConfig)
    except (ImportError, AttributeError) as error:
        _log.warning(
            "folders of dbf_compile cannot be served by this vLLM (%s: %s); other models can",
            type(error).__name__,
            error,
        )
