"""The quantization config of vLLM: which layer of vLLM is served by what, and that none of the folder's is forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from dbf_compile.checksums import listed
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.integrations.content import METHOD, check_content, check_index
from dbf_compile.integrations.transformers import DBFConfig
from dbf_compile.integrations.vllm.experts import ExpertsMethod
from dbf_compile.integrations.vllm.linear import DenseLinearMethod, FactoredLinearMethod
from dbf_compile.integrations.vllm.split import SplitLinearMethod
from dbf_compile.integrations.vllm.vocabulary import VocabularyMethod

_log = init_logger("vllm.dbf_compile")  # vLLM shows what comes from below its own name


class VLLMConfig(QuantizationConfig):
    """What a compressed folder's config.json says, for vLLM.

    Args:
        config: of transformers, checked.
    """

    def __init__(self, config: DBFConfig) -> None:
        super().__init__()
        self.layers = {name: dict(entry) for name, entry in config.layers.items()}
        self.tables = {name: dict(entry) for name, entry in config.tables.items()}
        self.served: set[str] = set()
        self._methods: list[FactoredLinearMethod] = []
        self._dense: set[str] = set()  # what our own backend would factor, if it compiled

    def get_name(self) -> str:
        """Return the name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of activations that kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least compute capability of a GPU: the kernels use bfloat16."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no files: everything stands in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VLLMConfig:
        """Return the config for ``quantization_config`` of config.json.

        Raises:
            CheckpointError: a newer version, or a table of layers that no compression wrote.
        """
        return cls(DBFConfig(**config))

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        """Compare a local folder with what was written.

        Raises:
            CheckpointError: it is damaged.
        """
        folder = Path(model_name)
        if folder.is_dir():
            check_index(folder)
            check_content(sorted(folder.glob("model*.safetensors")))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Give layers the names that they have in vLLM."""
        self.layers = _renamed(self.layers, hf_to_vllm_mapper, "shares_first_stage_with")
        self.tables = _renamed(self.tables, hf_to_vllm_mapper, "shares_rows_with")

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what serves a layer; None for one that vLLM serves itself."""
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary(layer, prefix)
        if isinstance(layer, LinearBase):
            names = self._names(prefix)
            self._dense.update(set(names) - set(self.layers))
            if any(name in self.layers for name in names):
                split = _settings().get("split_stages") and not isinstance(layer, ReplicatedLinear)
                return self._factored(names, SplitLinearMethod if split else FactoredLinearMethod)
            return DenseLinearMethod(names)
        if isinstance(layer, RoutedExperts):
            names = [name for name in self.layers if name.startswith(f"{prefix}.")]
            self.served.update(names)
            return ExpertsMethod(layer.moe_config, prefix, self.layers) if names else None
        return None

    def get_checkpoint_weight_mapper(self) -> Any:
        """Return how tensors are renamed: not at all. vLLM asks once all layers are there, and before it reads any.

        Raises:
            ConversionError: no layer of vLLM serves a layer of the folder.
            OptionError: vLLM is to compile with the backend "dbf", which would do what is not asked for.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        current = get_current_vllm_config()
        compilation = current.compilation_config
        if compilation.mode and compilation.backend == "dbf":
            self._check_backend()
        if current.parallel_config.pipeline_parallel_size == 1:
            forgotten = sorted(set(self.layers) - self.served)
            if forgotten:
                raise ConversionError(
                    f"factors for {listed(forgotten)}, which vLLM has no layer for that could be served",
                    "linear layers and heads of the model",
                    "leave these layers dense: name them in skip=[...]",
                )
        whole = sum(method.whole_bits for method in self._methods)
        if whole:
            share = sum(method.own_bits for method in self._methods) / whole
            _log.info("this rank holds %.0f %% of the signs of factored linear layers", 100 * share)
        return WeightsMapper()

    def _check_backend(self) -> None:
        if envs.VLLM_USE_AOT_COMPILE:
            raise OptionError(
                "compilation_config with backend 'dbf', whose code vLLM cannot keep on disk",
                "VLLM_USE_AOT_COMPILE=0 with that backend",
                "set it in the environment, or leave the backend to vLLM, which calls the same kernels",
            )
        if self._dense:
            raise OptionError(
                f"compilation_config with backend 'dbf', which would factor {listed(sorted(self._dense))}, too",
                "a folder without dense linear layers beside the head",
                "leave the backend to vLLM, which calls the same kernels",
            )

    def _factored(self, names: Sequence[str], kind: type[FactoredLinearMethod]) -> FactoredLinearMethod:
        self.served.update(names)
        self._methods.append(kind(names, self.layers))
        return self._methods[-1]

    def _names(self, prefix: str) -> Sequence[str]:
        """Return the names in the folder of what a layer of vLLM stands for."""
        parent, _, name = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(name, [name])
        if prefix in self.layers:
            fused = [name]
        return [f"{parent}.{one}" if parent else one for one in fused]

    def _vocabulary(self, layer: VocabParallelEmbedding, prefix: str) -> QuantizeMethodBase | None:
        if prefix in self.layers and isinstance(layer, ParallelLMHead):
            return self._factored([prefix], FactoredLinearMethod)
        return VocabularyMethod() if self.tables and (not prefix or prefix in self.tables) else None


def _settings() -> dict[str, Any]:
    """Return what the user gave as ``additional_config={"dbf": ...}``.

    Raises:
        OptionError: it has something else than is known.
    """
    user = get_current_vllm_config().additional_config
    settings = user.get("dbf", {}) if isinstance(user, dict) else {}
    if not isinstance(settings, dict) or set(settings) - {"split_stages"}:
        raise OptionError(
            f"additional_config with dbf={settings!r}", '{"split_stages": true}', "take out the rest"
        )
    return settings


def _renamed(entries: dict[str, Any], mapper: Any, owner: str) -> dict[str, Any]:
    renamed = mapper.apply_dict(entries)
    return {
        name: {**entry, owner: None if entry[owner] is None else mapper.map_name(entry[owner])}
        for name, entry in renamed.items()
    }
