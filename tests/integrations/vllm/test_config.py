"""Which layer of vLLM is served by what; names of the folder and of the engine; what is forgotten is refused."""

from __future__ import annotations

import pickle  # noqa: TID251, vLLM sends the config to its workers
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
from support.models.pretrained import QUICK
from support.models.tiny import tiny_llama
from support.strategies import random_factors
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.utils import WeightsMapper

import dbf_compile
from dbf_compile.errors import CheckpointError, ConversionError, OptionError
from dbf_compile.integrations.transformers import DBFConfig, layer_table
from dbf_compile.integrations.vllm.config import VLLMConfig


@pytest.fixture(autouse=True)
def current_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def config_of(names: tuple[str, ...], **tables: Any) -> VLLMConfig:
    factors = random_factors(64, 33, 40 * len(names)).split([40] * len(names))
    return VLLMConfig(DBFConfig(layer_table(dict(zip(names, factors, strict=True))), **tables))


def test_names_of_the_folder_become_those_of_the_engine() -> None:
    tables = {"model.wte": {"kind": "int8", "shares_rows_with": None}}
    config = config_of(("model.h.0.q", "model.h.0.k"), tables=tables)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert list(config.layers) == ["language_model.model.h.0.q", "language_model.model.h.0.k"]
    assert (
        config.layers["language_model.model.h.0.k"]["shares_first_stage_with"] == "language_model.model.h.0.q"
    )
    assert config.tables == {"language_model.model.wte": {"kind": "int8", "shares_rows_with": None}}


def test_it_goes_to_the_workers_and_back() -> None:
    config = config_of(("q", "k"))
    again = pickle.loads(pickle.dumps(config))
    assert again.layers == config.layers and again.get_name() == "dbf"


def test_layers_that_no_layer_of_the_engine_serves_are_refused() -> None:
    config = config_of(("model.layers.0.mlp.experts.down_proj.3",))
    with pytest.raises(ConversionError, match=r"experts\.down_proj\.3, which vLLM has no layer for"):
        config.get_checkpoint_weight_mapper()
    config.served.update(config.layers)
    assert config.get_checkpoint_weight_mapper() == WeightsMapper()


def test_what_our_backend_would_do_unasked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(("q",))
    config.served.add("q")
    with set_current_vllm_config(VllmConfig(compilation_config={"mode": 2, "backend": "dbf"})):
        monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")
        with pytest.raises(OptionError, match="VLLM_USE_AOT_COMPILE=0"):
            config.get_checkpoint_weight_mapper()
        monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "0")
        config.get_checkpoint_weight_mapper()
        ReplicatedLinear(64, 40, bias=False, quant_config=config, prefix="router", disable_tp=True)
        with pytest.raises(OptionError, match="would factor router, too"):
            config.get_checkpoint_weight_mapper()


def test_a_table_of_layers_that_no_compression_wrote_is_refused() -> None:
    with pytest.raises(CheckpointError, match="mid_features of 1 or more"):
        VLLMConfig.from_config({"quant_method": "dbf", "layers": {"q": {"mid_features": 0}}})
    with pytest.raises(CheckpointError, match="update dbf_compile"):
        VLLMConfig.from_config({"quant_method": "dbf", "dbf_format_version": 99})


def test_a_damaged_folder_is_refused_before_its_weights_are_loaded(tmp_path: Path) -> None:
    folder = dbf_compile.compress(tiny_llama(1), tmp_path / "folder", **QUICK).folder
    config = config_of(("q",))
    config.maybe_update_config(str(folder))
    config.maybe_update_config("organization/model-of-the-hub")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="content that has changed"):
        config.maybe_update_config(str(folder))
