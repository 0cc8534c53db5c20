"""An action runs when a module is imported, and does not import it."""

import importlib.machinery
import importlib.resources
import importlib.util
import subprocess
import sys

import pytest

from dbf_compile.integrations.on_import import when_imported


def test_a_module_that_is_imported_already_counts_at_once():
    seen = []
    when_imported("json", lambda: seen.append(1))
    assert seen == [1]


def test_the_action_comes_once_right_after_the_module(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    before = list(sys.meta_path)
    when_imported("late_module", lambda: seen.append(sys.modules["late_module"].value))
    assert seen == []
    import late_module

    assert seen == [7] and sys.meta_path == before
    del sys.modules["late_module"]
    import late_module  # noqa: F401, F811

    assert seen == [7]


def test_a_module_that_is_looked_for_first_is_not_missed(tmp_path, monkeypatch):
    (tmp_path / "sought").mkdir()
    (tmp_path / "sought" / "__init__.py").write_text("value = 7\n")
    (tmp_path / "sought" / "notes.txt").write_text("of the package")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    before = list(sys.meta_path)
    for number in range(2):
        when_imported("sought", lambda number=number: seen.append(number))
    assert importlib.util.find_spec("sought") is not None and seen == []
    import sought

    assert seen == [0, 1] and sys.meta_path == before
    # The package is as if nobody had waited for it.
    assert type(sought.__spec__.loader) is type(sought.__loader__) is importlib.machinery.SourceFileLoader
    assert importlib.resources.files("sought").joinpath("notes.txt").read_text() == "of the package"


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


REGISTERED = """
import torch
from peft import LoraConfig, get_peft_model
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
dbf_compile.convert_(model, bits=4.0, iterations=2, progress=False)
adapted = get_peft_model(model, LoraConfig(target_modules=["0"]))
print("dbf" in AUTO_QUANTIZER_MAPPING, type(adapted.base_model.model[0]).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import dbf_compile, sys; assert not {'transformers', 'peft'} & sys.modules.keys(); import peft.tuners.lora",
        "import importlib.util; importlib.util.find_spec('peft'); import peft, dbf_compile",
    ],
    ids=["before a part", "after"],
)
def test_transformers_and_peft_learn_of_layers_in_either_order_and_are_not_imported_for_it(imports):
    pytest.importorskip("peft")
    assert run(imports + REGISTERED) == "True LoraDoubleBinaryLinear"
