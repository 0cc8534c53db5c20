"""A program of two processes that shard, save, load and train a converted model; prints the errors of each as JSON."""

import copy
import json
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.models.sharing import sharing
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dbf_compile.tables import quantize_tables, swap_tables_

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
FULL = StateDictOptions(full_state_dict=True)


def error(model: Callable[[Tensor], tuple[Tensor, ...]]) -> float:
    return max(float((y - expected).abs().max()) for y, expected in zip(model(X), sharing()(X), strict=True))


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def reloaded(saved: nn.Module, other: nn.Module, folder: str) -> nn.Module:
    dcp.save(get_model_state_dict(saved), checkpoint_id=folder)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state)
    return other


def from_meta() -> nn.Module:
    model = sharded(sharing(1).to("meta")).to_empty(device="cpu")
    set_model_state_dict(model, sharing().state_dict(), options=FULL)
    return model


def gathered() -> nn.Module:
    model = sharing(1)
    model.load_state_dict(get_model_state_dict(sharded(sharing()), options=FULL))
    return model


def gradient(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> Tensor:
    model.q.bias.requires_grad_(True)
    wrap(model)(X)[0].sum().backward()
    gradient = model.q.bias.grad
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def gradient_error(wrap: Callable[[nn.Module], nn.Module]) -> float:
    expected = gradient(sharing(), lambda model: model)
    return float((gradient(sharing(), wrap) - expected).abs().max() / expected.abs().max())


def table_error() -> float:
    model = nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 40)).requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    model = swap_tables_(model, quantize_tables(model, {"0": "int8", "1": "int4"}))
    ids = torch.tensor([[1, 39, 0]])
    return float((model(ids) - sharded(copy.deepcopy(model))(ids)).abs().max())


def main() -> None:
    """Run all ways one after the other."""
    dist.init_process_group("gloo")
    folder = sys.argv[1]
    errors = {
        "FSDP2": error(sharded(sharing())),
        "FSDP2, compiled": error(torch.compile(sharded(sharing()), backend="dbf")),
        "FSDP2, from meta": error(from_meta()),
        "FSDP2, gathered": error(gathered()),
        "FSDP2, tables": table_error(),
        "a checkpoint, sharded": error(reloaded(sharded(sharing()), sharded(sharing(1)), f"{folder}/one")),
        "a checkpoint, from shards": error(reloaded(sharded(sharing()), sharing(1), f"{folder}/two")),
        "FSDP2, trained": gradient_error(sharded),
        "DDP, trained": gradient_error(DistributedDataParallel),
    }
    if dist.get_rank() == 0:
        print(json.dumps(errors), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
