"""A converted model keeps to the protocol of a dense one: what copies, saves, shards, averages or trains modules may do so."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.models.sharing import sharing
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_leaves

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))


def same(model: Callable[[Tensor], Any], expected: nn.Module) -> bool:
    pairs = zip(tree_leaves(model(X)), tree_leaves(expected(X)), strict=True)
    return all(torch.equal(value, reference) for value, reference in pairs)


def is_tied(model: nn.Module) -> bool:
    return model.q.signs_in is model.k.signs_in and model.q.scale_in is model.k.scale_in


def saved(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "state.pt")
    return folder / "state.pt"


def loaded(path: Path, assign: bool = False, meta: bool = False, **options: Any) -> nn.Module:
    other = sharing(1)
    if meta:
        other = other.to("meta") if assign else other.to("meta").to_empty(device="cpu")
    other.load_state_dict(torch.load(path, weights_only=True, **options), assign=assign)
    return other


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    result: nn.Module = torch.load(file, weights_only=False)
    return result


def written_in_place(model: nn.Module, copy_: Callable[[list[Tensor], list[Tensor]], None]) -> nn.Module:
    other = sharing(1)
    copy_(list(other.state_dict().values()), list(model.state_dict().values()))
    return other


def one_by_one(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def through_a_checkpoint(model: nn.Module, folder: Path) -> nn.Module:
    other = sharing(1)
    state = other.state_dict()
    dcp.save(model.state_dict(), checkpoint_id=folder, no_dist=True)
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    other.load_state_dict(state)
    return other


WAYS: dict[str, Callable[[nn.Module, Path], Callable[[Tensor], Any]]] = {
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "torch.save of the model": lambda model, folder: through_a_file(model),
    "shared memory": lambda model, folder: copy.deepcopy(model).share_memory(),
    "load": lambda model, folder: loaded(saved(model, folder)),
    "load by mmap": lambda model, folder: loaded(saved(model, folder), mmap=True),
    "assign": lambda model, folder: loaded(saved(model, folder), assign=True),
    "assign by mmap": lambda model, folder: loaded(saved(model, folder), assign=True, mmap=True),
    "meta and assign": lambda model, folder: loaded(saved(model, folder), assign=True, meta=True),
    "meta and to_empty": lambda model, folder: loaded(saved(model, folder), meta=True),
    "in place": lambda model, folder: written_in_place(model, one_by_one),
    "in place, all at once": lambda model, folder: written_in_place(model, torch._foreach_copy_),
    "functional_call": lambda model, folder: (
        lambda x: functional_call(sharing(1), dict(model.named_parameters()), (x,))
    ),
    "functional_call of a state": lambda model, folder: (
        lambda x: functional_call(sharing(1), model.state_dict(), (x,), tie_weights=False)
    ),
    "stack_module_state": lambda model, folder: stacked(model),
    "torch.distributed.checkpoint": through_a_checkpoint,
    "no gradients": lambda model, folder: copy.deepcopy(model).requires_grad_(False),
    "a step of an optimizer": lambda model, folder: stepped(copy.deepcopy(model)),
}
TIED = ("deepcopy", "torch.save of the model", "shared memory", "load", "meta and to_empty", "in place")


def stacked(model: nn.Module) -> Callable[[Tensor], Any]:
    parameters, buffers = stack_module_state([sharing(1), model])  # type: ignore[list-item]
    skeleton = sharing(2).to("meta")

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(skeleton, (parameters, buffers), (x,))

    return lambda x: [y[1] for y in vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)]


def stepped(model: nn.Module) -> nn.Module:
    torch.optim.AdamW(model.parameters(), weight_decay=0.1).step()
    model.zero_grad()
    return model


@pytest.mark.parametrize("way", WAYS)
def test_a_model_computes_the_same_whichever_way_it_went(way: str, tmp_path: Path) -> None:
    model = sharing()
    other = WAYS[way](model, tmp_path)
    assert same(other, sharing()) and same(model, sharing())
    assert way not in TIED or is_tied(other)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_the_bits_and_what_is_shared(dtype: torch.dtype) -> None:
    model = sharing().to(dtype)
    assert torch.equal(model.q.signs_in, sharing().q.signs_in) and is_tied(model)
    assert all(y.dtype == dtype for y in model(X.to(dtype)))


def test_what_is_trained_is_told_by_requires_grad() -> None:
    """``requires_grad`` splits parameters into what optimizers, ``torch.func`` and vectors take, and the factors."""
    model = sharing()
    model.q.bias.requires_grad_(True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained) == ["q.bias"]

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        total: Tensor = functional_call(model, parameters, (X,))[0].square().sum()
        return total

    gradients = torch.func.grad(loss)({name: p.detach() for name, p in trained.items()})
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    model(X)[0].square().sum().backward()
    torch.testing.assert_close(gradients["q.bias"], model.q.bias.grad)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    before = nn.utils.parameters_to_vector(trained.values())
    nn.utils.vector_to_parameters(before + 1, trained.values())
    assert torch.equal(model.q.bias, before + 1)
    assert torch.equal(model(X)[1], sharing()(X)[1])


def test_gradients_of_signs_are_refused() -> None:
    with pytest.raises(RuntimeError, match="floating point"):
        sharing().requires_grad_(True)


@pytest.mark.slow
def test_two_processes_shard_save_and_train_a_model(tmp_path: Path) -> None:
    program = Path(__file__).parents[1] / "support" / "two_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = {
        "PYTHONPATH": os.pathsep.join([str(program.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, str(program), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, **paths},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    errors = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert len(errors) == 9
    # Sums of gradients of two processes, in another order.
    assert max(errors.values()) < 1e-5, errors
