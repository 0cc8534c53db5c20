"""Adapters on a compressed model: the signs stay, LoRA of PEFT learns.

python examples/train_lora.py
"""

from __future__ import annotations

import peft
import torch
import transformers

import dbf_compile
from dbf_compile.integrations.peft import add_lora


def main() -> None:
    """Compress a tiny Llama and train adapters on one sentence."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)  # or a folder: AutoModelForCausalLM.from_pretrained(...)
    dbf_compile.convert_(model, bits_per_weight=2.0, preset="fast", progress=False)

    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = add_lora(model, lora)
    adapted.print_trainable_parameters()

    ids = torch.tensor([list(b"Signs are added, scales are multiplied.")])
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=2e-2)
    adapted.train()
    for step in range(30):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:2}  loss {loss.item():.3f}")
    print(f"at the end  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
