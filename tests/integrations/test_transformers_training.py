"""Trainer of transformers and compressed folders: what learns there is saved and comes back."""

import pytest
import torch
from support.models.compressed import compressed_folder

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dbf_compile import DoubleBinaryLinear  # noqa: E402


@pytest.mark.slow
def test_trainer_trains_scales_and_norms(tmp_path):
    folder = compressed_folder(tmp_path)["folder"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.modules():
        if isinstance(layer, DoubleBinaryLinear):
            for scale in (layer.scale_in, layer.scale_mid, layer.scale_out):
                scale.data = scale.data.float()  # steps of Adam are smaller than float16 tells apart
                scale.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, report_to=[], use_cpu=True, learning_rate=0.01, save_strategy="no"
    )
    rows = [{"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)}] * 4
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {f"model.layers.1.mlp.down_proj.scale_{name}" for name in ("in", "mid", "out")} <= changed
    assert "model.norm.weight" in changed and not any("signs" in name for name in changed)
    trainer.save_model(tmp_path / "trained")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
