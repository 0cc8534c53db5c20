"""Models that a folder would not give back are refused before the work; a folder that is another model takes no place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from support.models.pretrained import QUICK
from support.models.tiny import tiny_bert, tiny_llama

import dbf_compile
from dbf_compile.errors import CheckpointError, ConversionError, DBFError
from dbf_compile.integrations import folder as model_folder
from dbf_compile.integrations import pretrained
from dbf_compile.options import CompressOptions
from dbf_compile.run.request import Request
from dbf_compile.run.verification import changed_tensors, differences, random_batch


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 256, (1, 12), generator=generator)} for _ in range(count)]


def masked() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=256
    )
    return BertForMaskedLM(config).eval()


def tied() -> Any:
    return tiny_llama(tie_word_embeddings=True)


def random_linear(rows: int = 256, columns: int = 64) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(layer.weight, std=0.1, generator=torch.Generator().manual_seed(9))
    return layer


# What a user did to a model, and can go on with: the folder has to be this very model.


def replace_head(model: Any) -> None:
    model.lm_head = random_linear()


def replace_decoder(model: Any) -> None:
    model.cls.predictions.decoder.weight = random_linear().weight  # its bias stays tied


def tie_by_hand(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def tie_layers(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def tie_modules(model: Any) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def resize(model: Any) -> None:
    model.resize_token_embeddings(270)


def to_bfloat16(model: Any) -> None:
    model.to(torch.bfloat16)


def train(model: Any) -> None:
    model.train()


def without_quantization(model: Any) -> None:
    model.config.quantization_config = None


def merge_adapter(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    return adapted.merge_and_unload()


KEPT: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (tied, replace_head),
    (tied, resize),
    (masked, replace_decoder),
    (tied, tie_modules),
    (tiny_llama, tie_by_hand),
    (tiny_llama, tie_layers),
    (tiny_llama, tie_modules),
    (tiny_llama, to_bfloat16),
    (tiny_llama, train),
    (tiny_llama, without_quantization),
    (tiny_llama, merge_adapter),
    (tiny_llama, nn.DataParallel),
    (tiny_llama, torch.compile),
]


def changed(kind: Callable[[], Any], change: Callable[[Any], Any]) -> Any:
    model = kind().requires_grad_(False)
    result = change(model)
    return model if result is None else result


@pytest.mark.filterwarnings("ignore:only .* of the weights are factored")
@pytest.mark.parametrize(("kind", "change"), KEPT, ids=lambda value: getattr(value, "__name__", ""))
def test_a_model_comes_back_as_it_was_judged(kind: Any, change: Any, tmp_path: Path) -> None:
    model = changed(kind, change)
    made = dbf_compile.compress(model, tmp_path / "made", batches=batches(), **QUICK)
    inner = pretrained.unwrapped(model)
    loaded = type(inner).from_pretrained(made.folder).eval()
    with torch.no_grad():
        ids = batches(1)[0]["input_ids"]
        expected, answer = inner.eval()(ids).logits, loaded(ids).logits
    # 4 bits a weight of random matrices are close; a head, an embedding or a layer of another model is not.
    assert (answer - expected).norm() < 0.6 * expected.norm()
    assert not loaded.config.tie_word_embeddings or loaded.lm_head.weight is loaded.model.embed_tokens.weight


# What would be lost, and the words in which it is refused.


def add_parameter(model: Any) -> None:
    model.model.extra = nn.Parameter(torch.ones(3))


def add_module(model: Any) -> None:
    model.model.layers[0].gate = nn.Linear(64, 64)


def drop_layer(model: Any) -> None:
    del model.model.layers[1]


def grow_embedding(model: Any) -> None:
    model.model.embed_tokens = nn.Embedding(300, 64)


def add_hook(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)


def change_epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon = 0.5


def change_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def change_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 2


def mix_dtypes(model: Any) -> None:
    model.to(torch.bfloat16)
    model.model.norm.weight = nn.Parameter(torch.full((64,), 1.0001))


def rename_in_state(model: Any) -> None:
    def rename(module: Any, state: dict[str, Any], *_: Any) -> None:
        state["other.weight"] = state.pop("model.norm.weight")

    model.register_state_dict_post_hook(rename)


def spoil_generation(model: Any) -> None:
    model.generation_config.temperature = 0.5  # and do_sample stays False


def spoil_config(model: Any) -> None:
    model.config.extra = object()


def adapt(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def add_adapter(model: Any) -> None:
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))


def convert(model: Any) -> Any:
    return dbf_compile.convert_(model, bits=4.0, iterations=2, progress=False)


def without_content(model: Any) -> Any:
    return model.to("meta")


REFUSED = [
    (add_parameter, "left over: model.extra"),
    (add_module, r"left over: model.layers.0.gate.bias, model.layers.0.gate.weight"),
    (drop_layer, r"missing: .*and \d+ more"),
    (grow_embedding, r"of another shape: model.embed_tokens.weight \(300, 64\), not \(256, 64\)"),
    (add_hook, "load as another.*answers that are .* apart"),
    (change_epsilon, "load as another.*answers"),
    (change_activation, "load as another.*answers"),
    (change_frequencies, "other tensors: model.rotary_emb.inv_freq"),
    (mix_dtypes, "with tensors of others.*model.norm.weight"),
    (rename_in_state, "left over: other.weight"),
    (spoil_generation, "cannot be saved.*temperature"),
    (spoil_config, "cannot be saved"),
    (adapt, "adapter that is not merged"),
    (add_adapter, "adapter that is not merged"),
    (convert, "quantized already"),
    (without_content, "without content"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_a_folder_would_lose_is_refused_before_the_work(
    change: Any, message: str, tmp_path: Path
) -> None:
    model = changed(tiny_llama, change)
    config = CompressOptions(device="cpu", mode="independent")
    with pytest.raises(ConversionError, match=message):
        Request.of(model, tmp_path / "made", config, None, batches(), None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["tensor", "setting", "missing"])
def test_a_folder_that_is_another_model_takes_no_place_and_the_work_is_kept(
    damage: str, tmp_path: Path, monkeypatch: Any
) -> None:
    write, pieces = model_folder.write_model, model_folder._pieces

    def spoiled(*args: Any) -> Any:
        for name, size, make in pieces(*args):
            if name != "model.norm.weight":
                yield name, size, make
            elif damage == "tensor":
                yield name, size, lambda: torch.full((64,), 2.0)

    if damage == "setting":

        def write_other(folder: Path, compressed: Any, *others: Any) -> int:
            compressed.model.config.rms_norm_eps = 0.5
            return write(folder, compressed, *others)

        monkeypatch.setattr(model_folder, "write_model", write_other)
    else:
        monkeypatch.setattr(model_folder, "_pieces", spoiled)
    expected = {
        "tensor": "other tensors: model.norm.weight",
        "setting": "equal tensors, but",
        "missing": "missing: model.norm",
    }
    with pytest.raises(CheckpointError, match=expected[damage]):
        dbf_compile.compress(tiny_llama(), tmp_path / "made", batches=batches(), **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["made.work"]


def test_tensors_that_differ_are_named() -> None:
    model = tiny_llama()
    other = copy.deepcopy(model)
    assert changed_tensors(model, other) == [] and differences(model, other, None) is None
    other.model.norm.weight.data[3] = float("nan")
    other.model.rotary_emb.register_buffer("extra", torch.ones(2))
    assert changed_tensors(model, other) == ["model.norm.weight", "model.rotary_emb.extra"]
    model.model.norm.weight.data[3] = float("nan")  # the same NaN
    assert changed_tensors(model, other) == ["model.rotary_emb.extra"]


@pytest.mark.parametrize("model", [tiny_llama, tiny_bert], ids=["causal", "encoder"])
def test_random_batches_are_what_a_model_reads(model: Any) -> None:
    one = model()
    batch = random_batch(one)
    assert torch.isfinite(one(**batch)[0]).all()


def test_pictures_are_what_a_model_of_pictures_reads() -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).eval()
    assert random_batch(model)["pixel_values"].shape == (1, 3, 16, 16)


def test_other_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DBFError, match="convert_ for other modules"):
        dbf_compile.compress(nn.Linear(64, 64), tmp_path / "made")


@pytest.mark.parametrize("place", ["run.work", "run.folder", "integrations.folder"])
def test_a_text_that_cannot_be_written_is_a_clear_error_and_the_work_is_kept(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"dbf_compile.{place}.write_text", full)
        with pytest.raises(DBFError, match=r"No space left on device.*allowed: a folder.*make room"):
            dbf_compile.compress(tiny_llama(), tmp_path / "made", batches=batches(), **QUICK)
    assert {path.name for path in tmp_path.iterdir()} <= {"made.work"}
    assert dbf_compile.compress(tiny_llama(), tmp_path / "made", batches=batches(), **QUICK).folder.is_dir()


def test_a_report_does_not_say_how_many_processes_made_it(tmp_path: Path) -> None:
    reports = [
        dbf_compile.compress(
            tiny_llama(), tmp_path / str(workers), batches=batches(), workers=workers, **QUICK
        ).report
        for workers in (1, 2)
    ]
    assert reports[0].settings == reports[1].settings
    assert reports[0].settings["bits_per_weight"] == 4.0


def test_work_that_a_killed_process_left_beside_a_finished_folder_is_removed(tmp_path: Path) -> None:
    done = dbf_compile.compress(tiny_llama(), tmp_path / "made", batches=batches(), keep_work=True, **QUICK)
    assert (tmp_path / "made.work").is_dir()
    again = dbf_compile.compress(tiny_llama(), tmp_path / "made", batches=batches(), **QUICK)
    assert again.report == done.report
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
