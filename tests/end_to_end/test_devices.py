"""Everything runs on another device than the CPU.

CI has no GPU. A pretended device stands in, whose operators refuse tensors of the CPU as a GPU's do. It shows where a
program mixes devices, and nothing about a GPU's speed or kernels.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.models.compressed import SHORT, compressed_folder
from support.models.pretrained import FAST, text_of, tiny_folder

pytest.importorskip("transformers")
pytestmark = [pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"), pytest.mark.slow]

import dbf_compile  # noqa: E402
from dbf_compile import machine  # noqa: E402
from dbf_compile.calibration import model_io  # noqa: E402
from dbf_compile.factorizer import admm  # noqa: E402

RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from support.device.pretended import load
device = load(Path(sys.argv[2]))
"""
# Exit without finalizing the interpreter: once in a hundred runs autograd's thread for the device still needs it, and the
# process aborts.
END = """
import os
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def on_device(tmp_path_factory):
    """Run a program in a process where ``device`` is the pretended one, and return the JSON it prints last."""
    folder = tmp_path_factory.mktemp("pretended")

    def run(program, *arguments):
        command = [sys.executable, "-c", RUN + program + END, str(Path(__file__).parents[1]), str(folder)]
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_the_device_refuses_tensors_of_the_cpu_and_keeps_gradients(on_device):
    """The other tests rely on this."""
    device, refused, error = on_device("""
import torch
layer = torch.nn.Linear(5, 3).to(device)
there = torch.randn(4, 5, device=device)
layer(there).square().sum().backward()
refused = 0
for mixed in (lambda: layer(torch.randn(4, 5)), lambda: there + torch.ones(4, 5), lambda: torch.cat([there, there.cpu()])):
    try:
        mixed()
    except RuntimeError:
        refused += 1
exact = torch.nn.functional.linear(there.cpu(), layer.weight.cpu(), layer.bias.cpu())
print(json.dumps([str(layer.weight.grad.device), refused, float((layer(there).cpu() - exact).abs().max())]))
""")
    assert (device, refused, error) == ("hpu:0", 3, 0)


def test_at_most_one_block_is_away_from_home(on_device):
    away, moments = on_device("""
import torch
from support.models.tiny import tiny_llama
from dbf_compile import calibrate
model = tiny_llama(3).requires_grad_(False)
blocks = list(model.model.layers)
away = []

def watch(*_):
    away.append([n for n, block in enumerate(blocks) if any(p.device == device for p in block.parameters())])

for layer in model.modules():
    if isinstance(layer, torch.nn.Linear):
        layer.register_forward_pre_hook(watch)
ids = torch.randint(1, 64, (1, 12), generator=torch.Generator().manual_seed(0))
there = calibrate(model, [ids], device=device)
seen = list(away)
assert all(p.device.type == "cpu" for p in model.parameters())
here = calibrate(model, [ids])
apart = [
    float((mine.cpu() - there[name].moments()[kind].cpu()).abs().max() / mine.abs().max())
    for name, item in here.items()
    for kind, mine in item.moments().items()
    if mine is not None
]
print(json.dumps([seen, max(apart)]))
""")
    visits = [blocks[0] for blocks in away if blocks]
    assert max(map(len, away)) == 1
    # Each block once forward and again for the backward pass, in which each of its layers is called.
    assert [visits[place] for place in range(0, len(visits), 7)] == [0, 1, 2, 2, 1, 0]
    assert moments < 1e-4


WAYS = {
    "independent-diagonal": {"mode": "independent", "own_text": 0.5},
    "block-diagonal": {"mode": "block"},
    "block-whole": {"mode": "block", "budget": "equal", "form": "input"},
}


@pytest.fixture(scope="module")
def compressed(on_device, dense, tmp_path_factory):
    """What is reported of the model compressed in each of the ways: there, all in one process, and here."""
    ways = {way: {**FAST, **options, "data": str(text_of(dense))} for way, options in WAYS.items()}
    place = tmp_path_factory.mktemp("compressed")
    program = """
import dbf_compile
reports = {}
for way, settings in json.loads(sys.argv[5]).items():
    made = dbf_compile.compress(sys.argv[3], f"{sys.argv[4]}/{way}", device=device, **settings)
    reports[way] = dict(made.report)
print(json.dumps(reports))
"""
    there = on_device(program, dense, place, json.dumps(ways))
    with pytest.MonkeyPatch.context() as patch:
        # The device multiplies in float32. So does this processor here, whatever it has for bfloat16.
        for module in (machine, model_io, admm):
            patch.setattr(module, "multiplies_bfloat16", lambda kind: False)
        return {
            way: (
                there[way],
                dbf_compile.compress(dense, place / f"{way} here", device="cpu", **settings).report,
            )
            for way, settings in ways.items()
        }


@pytest.mark.parametrize("way", WAYS)
def test_a_model_compressed_there_is_the_one_compressed_here(compressed, way):
    there, here = compressed[way]
    assert there["machine"]["device"] == "hpu:0"
    assert there["bits"] == here["bits"]
    mine, theirs = ([layer["error"] for layer in report["layers"]] for report in (here, there))
    assert theirs[0] == pytest.approx(mine[0], rel=0.01)
    # Sums in another order flip a few signs, and later layers see other inputs. After three iterations and one epoch of
    # training, equal quality means within a factor of 2. Mixed-up data would be far off.
    assert 0.5 < sum(theirs) / sum(mine) < 2
    assert 0.5 < there["evaluation"]["kl"] / here["evaluation"]["kl"] < 2


def test_a_folder_is_evaluated_and_generates_there_as_here(on_device, dense, tmp_path):
    made = dbf_compile.compress(dense, tmp_path / "made", **{**FAST, "data": text_of(dense)})
    program = """
from dbf_compile.evaluation import evaluate_folder
from dbf_compile.generation import generate
judged = evaluate_folder(sys.argv[3], data=sys.argv[4], dense=sys.argv[5], length=16, windows=3, device=device)
text = generate(sys.argv[3], "add the signs", max_new_tokens=6, compiled=False, device=device).text
print(json.dumps([judged, text]))
"""
    judged, text = on_device(program, made.folder, text_of(dense), dense)
    from dbf_compile.evaluation import evaluate_folder
    from dbf_compile.generation import generate

    expected = evaluate_folder(made.folder, data=text_of(dense), dense=dense, length=16, windows=3)
    assert judged["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert judged["compressed"] == pytest.approx(expected["compressed"], rel=1e-5)
    assert text == generate(made.folder, "add the signs", max_new_tokens=6, compiled=False).text


def test_a_folder_learns_there_as_here(on_device, tmp_path):
    start = compressed_folder(tmp_path)
    options = {
        **SHORT,
        "sign_rate": 0.0,
        "own_text": 0.5,
        "hidden": 0.1,
    }  # signs would follow sums in another order
    program = """
import dbf_compile
folder, text, dense, output, cache = sys.argv[3:8]
options = json.loads(sys.argv[8])
there = dbf_compile.finetune(
    folder, {"words": Path(text)}, output, dense=dense, device=device, cache_dir=cache, **options
)
print(json.dumps([there.before["kl"], there.after["kl"]]))
"""
    places = (start["folder"], start["data"]["words"], start["dense"], tmp_path / "there", tmp_path / "cache")
    before, after = on_device(program, *places, json.dumps(options))
    here = dbf_compile.finetune(
        **start, output=tmp_path / "here", cache_dir=str(tmp_path / "own cache"), **options
    )
    assert [before, after] == pytest.approx([here.before["kl"], here.after["kl"]], rel=1e-3)
