"""Folders of transformers: what is written loads bit for bit, and what is damaged, newer or foreign is refused."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.forked import Forked
from support.models.pretrained import FAST, tiny_folder, weights_of
from support.models.tiny import error_of, tiny_gpt2

transformers = pytest.importorskip("transformers")

import dbf_compile  # noqa: E402
from dbf_compile.errors import CheckpointError, ConversionError, DBFError  # noqa: E402
from dbf_compile.integrations.transformers import DBFConfig, DBFQuantizer  # noqa: E402
from dbf_compile.linear import DoubleBinaryLinear  # noqa: E402

TOKENS = torch.arange(1, 10)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny compressed Llama; its q, k and v share their first stage."""
    place = tmp_path_factory.mktemp("hf")
    dense = tiny_folder(place / "dense")
    batches = [{"input_ids": TOKENS + n} for n in range(4)]
    dbf_compile.compress(dense, place / "made", batches=batches, mode="independent", **{**FAST, "distill": 0})
    return place / "made"


@pytest.fixture(scope="module")
def saved(folder):
    """The same, saved again by transformers: without the checksums that find any change of what compression wrote."""
    load(folder).save_pretrained(folder.parent / "saved")
    return folder.parent / "saved"


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def test_it_loads_as_factored_layers_that_share_their_first_stage(folder):
    model = load(folder)
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, DoubleBinaryLinear)
    assert attention.q_proj.signs_in is attention.k_proj.signs_in is attention.v_proj.signs_in
    assert attention.q_proj.signs_in is not attention.o_proj.signs_in
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert model.hf_quantizer.is_compileable and model.hf_quantizer.is_serializable()


def test_saved_again_it_is_the_same_bit_for_bit(folder, tmp_path):
    load(folder).save_pretrained(tmp_path / "again")
    first, second = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "again" / "model.safetensors"),
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert torch.equal(load(folder)(TOKENS).logits, load(tmp_path / "again")(TOKENS).logits)


class FakeHub:
    """Receives the uploads of ``push_to_hub`` as files of a folder."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **_):
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def create_commit(self, *, repo_id, operations, **_):
        for operation in operations:
            path = self.folder / repo_id / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())


@pytest.mark.slow
@pytest.mark.parametrize("trusted", [False, True])
def test_what_is_pushed_to_the_hub_loads_bit_for_bit(folder, tmp_path, monkeypatch, trusted):
    from huggingface_hub import ModelCard

    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: FakeHub(tmp_path))
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: ModelCard(""))
    load(folder, **({"trust_remote_code": True} if trusted else {})).push_to_hub("tiny")
    pushed = tmp_path / "me" / "tiny"
    first, second = load_file(folder / "model.safetensors"), load_file(pushed / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    loads = [LOADS, "import dbf_compile", LOADS, TRUSTED]
    assert run(pushed, *loads) == [UNKNOWN, "loaded", "loaded"]


def test_nothing_is_missing_and_nothing_unexpected(folder):
    _, info = load(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_casts_scales_and_keeps_signs(folder, dtype):
    exact, model = load(folder), load(folder, dtype=dtype)
    layer, same = model.model.layers[0].mlp.up_proj, exact.model.layers[0].mlp.up_proj
    assert torch.equal(layer.factors.signs_in, same.factors.signs_in)
    y = model(TOKENS).logits
    assert y.dtype == dtype
    # Two layers whose activations, weights and scales are rounded to 8 (11) bits.
    assert error_of(y, exact(TOKENS).logits) < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_a_device_map_loads_the_same(folder):
    pytest.importorskip("accelerate")
    assert torch.equal(load(folder, device_map="cpu")(TOKENS).logits, load(folder)(TOKENS).logits)


def test_shards_load_the_same(folder, tmp_path):
    dense = tiny_folder(tmp_path / "dense")
    batches = [{"input_ids": TOKENS + n} for n in range(4)]
    options = {**FAST, "distill": 0, "max_shard_size": 20_000}
    made = dbf_compile.compress(dense, tmp_path / "made", batches=batches, mode="independent", **options)
    assert len(list(made.folder.glob("*.safetensors"))) > 3
    assert torch.equal(load(made.folder)(TOKENS).logits, load(folder)(TOKENS).logits)


def test_it_compiles_into_one_graph(folder):
    model = load(folder)
    with torch.no_grad():
        expected = model(TOKENS).logits
        y = torch.compile(model, backend="dbf", fullgraph=True)(TOKENS).logits
    assert error_of(y, expected) < 1e-4  # as in test_transformers of end_to_end


def test_a_file_holds_what_its_names_say(folder):
    names = set(load_file(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "dbf" and config["dbf_format_version"] == 2
    q, k = (f"model.layers.0.self_attn.{kind}_proj" for kind in "qk")
    assert config["layers"][k]["shares_first_stage_with"] == q
    assert {f"{q}.signs_in", f"{q}.signs_out", f"{k}.signs_out", f"{k}.scale_out"} <= names
    assert f"{k}.signs_in" not in names
    # As a pretrained dense model of transformers, which knows no factors, would read it.
    assert load_file(folder / "model.safetensors")[f"{q}.weight"].numel() == 0


# Lines of a program that says what happens, in a process that has not imported this package.
LOADS, TRUSTED = "load()", "load(trust_remote_code=True)"
HIDDEN = "sys.modules['dbf_compile'] = None"
UNKNOWN = "Unknown quantization type, got dbf"
PROGRAM = """
import logging, sys
from transformers import AutoModelForCausalLM
from transformers.utils import logging as noise

messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
noise.get_logger().addHandler(handler)

def load(**options):
    messages.clear()
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
        print("RESULT loaded")
    except Exception as error:
        print("RESULT", " ".join([*messages, str(error)]).replace(chr(10), " "))
"""


def run(path, *lines):
    """Return what happens in each line that loads: "loaded", the name of the missing quantizer, or the whole error."""
    done = Forked("\n".join([PROGRAM, *lines]), path).wait()
    assert done.returncode == 0, done.stderr
    results = [
        line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")
    ]
    return [UNKNOWN if UNKNOWN in result else result for result in results]


@pytest.mark.slow
def test_without_this_package_it_fails_instead_of_being_random_and_trusted_code_imports_it(folder):
    assert run(folder, LOADS, TRUSTED) == [UNKNOWN, "loaded"]


@pytest.mark.slow
def test_trusted_code_without_this_package_says_what_to_install(folder):
    (error,) = run(folder, HIDDEN, TRUSTED)
    assert "dbf_compile" in error and error != "loaded"


def edit(path, change):
    """Change the table of layers, and drop the hash that would tell: other checks have to hold without it."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    config["quantization_config"].pop("content_hash", None)
    file.write_text(json.dumps(config))


LAYER = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(dbf_format_version=4), "dbf_format_version=4.*update"),
        (lambda c: c.update(layers=[]), "layers of type list"),
        (lambda c: c["layers"].update({"no.such": {"mid_features": 8}}), "no.such"),
        (lambda c: c["layers"][LAYER].update(mid_features=0), "mid_features of 1 or more"),
        (lambda c: c["layers"][LAYER].update(mid_features=True), "mid_features of 1 or more"),
        (lambda c: c["layers"].update({LAYER: 3}), "mid_features of 1 or more"),
        (lambda c: c["layers"][LAYER].update(shares_first_stage_with="other"), "first stage"),
        (lambda c: c["layers"][LAYER].update(shares_first_stage_with=LAYER), "first stage"),
        (lambda c: c["layers"][LAYER].update(shares_first_stage_with=[LAYER]), "first stage"),
        (lambda c: c["layers"][LAYER].update(shares_first_stage_with=[None]), "first stage"),
        (lambda c: c["layers"][LAYER].update(shares_first_stage_with=0), "first stage"),
        (lambda c: c.update(fused_experts=0), "fused_experts=0; allowed: a list"),
        (lambda c: c.update(fused_experts="all"), "fused_experts='all'; allowed: a list"),
        (lambda c: c.update(fused_experts=[[]]), "fused_experts=.*allowed: a list"),
    ],
)
def test_a_damaged_table_is_refused(copied, change, message):
    edit(copied, change)
    with pytest.raises(CheckpointError, match=message):
        load(copied)


def test_a_first_stage_of_another_width_is_refused(copied):
    def change(config):
        up = "model.layers.0.mlp.up_proj"
        config["layers"][up] = {
            "mid_features": config["layers"][LAYER]["mid_features"],
            "shares_first_stage_with": LAYER,
        }

    edit(copied, change)
    with pytest.raises(CheckpointError, match="in_features shares its first stage"):
        load(copied)


def rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    edit(path, lambda config: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.signs_in"), "without signs_in"),
        (lambda t: t.pop(f"{LAYER}.scale_mid"), "without scale_mid"),
        (lambda t: t[f"{LAYER}.scale_out"].fill_(float("nan")), "NaN"),
        (lambda t: t[f"{LAYER}.signs_in"].fill_(-1), "bits set behind column"),
    ],
)
def test_damaged_tensors_are_refused(copied, change, message):
    rewrite(copied, change)
    with pytest.raises(CheckpointError, match=message):
        load(copied)


def test_a_tensor_of_another_size_is_refused(copied):
    rewrite(copied, lambda t: t.update({f"{LAYER}.scale_mid": torch.ones(3, dtype=torch.float16)}))
    # Older versions of transformers leave it to us to notice.
    with pytest.raises((RuntimeError, CheckpointError), match=r"mismatched|144 rows for a scale of 3"):
        load(copied)


@pytest.mark.filterwarnings("ignore:.*since the model was compressed")
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_files_raise_errors_and_nothing_else(folder, tmp_path_factory, data):
    place = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(folder, place)
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray((place / name).read_bytes())
    # The header and the start of a file decide on how it is read.
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, min(len(content), 20_000) - 1))
        content[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (place / name).write_bytes(bytes(content))
    try:
        model = load(place)
    except (DBFError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError):
        return
    except Exception as error:
        assert type(error).__module__.startswith(("safetensors", "huggingface_hub", "transformers"))
        return
    assert model is not None  # the change was to something that does not matter, or to a weight


def test_factoring_while_loading_is_refused_with_what_to_do(tmp_path):
    tiny_folder(tmp_path / "dense")
    with pytest.raises((ConversionError, ValueError), match=r"compress|pre_quantized"):
        load(tmp_path / "dense", quantization_config=DBFConfig())


def test_tied_heads_and_conv1d(tmp_path):
    dense = tiny_folder(tmp_path / "gpt2", model=tiny_gpt2())
    batches = [{"input_ids": TOKENS + n} for n in range(4)]
    made = dbf_compile.compress(
        dense, tmp_path / "made", batches=batches, mode="independent", **{**FAST, "distill": 0}
    )
    model = load(made.folder)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model.transformer.h[0].attn.c_attn, DoubleBinaryLinear)
    assert "lm_head.weight" not in load_file(made.folder / "model.safetensors")


def test_equal_arguments_write_equal_files(folder, tmp_path):
    dense = tiny_folder(tmp_path / "dense")
    batches = [{"input_ids": TOKENS + n} for n in range(4)]
    made = dbf_compile.compress(
        dense, tmp_path / "made", batches=batches, mode="independent", **{**FAST, "distill": 0}
    )
    assert weights_of(made.folder) == weights_of(folder)


def plans_asked_while_loading(folder, monkeypatch, **sizes):
    """Ask a model for its plans of parallelism where transformers does: with layers in place and tensors not yet read."""
    insert = DBFQuantizer._process_model_before_weight_loading

    def ask(self, model, **kwargs):
        insert(self, model, **kwargs)
        return model._resolve_parallel_plans(transformers.distributed.DistributedConfig(**sizes))

    monkeypatch.setattr(DBFQuantizer, "_process_model_before_weight_loading", ask)
    return load(folder)


def test_layers_are_not_split_by_transformers(folder, monkeypatch):
    with pytest.raises(ConversionError, match="tensor parallelism of transformers over 2 processes"):
        plans_asked_while_loading(folder, monkeypatch, tp_size=2)


def test_layers_are_sharded_by_transformers_and_tables_are_not(folder, monkeypatch):
    plain = plans_asked_while_loading(folder, monkeypatch, fsdp_size=2)
    assert "_resolve_parallel_plans" not in vars(plain)
    monkeypatch.setattr(
        "dbf_compile.integrations.transformers.table_layers", lambda model: {"lm_head": model}
    )
    with pytest.raises(ConversionError, match="FSDP of transformers for a folder with quantized tables"):
        load(folder)
