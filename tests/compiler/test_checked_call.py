"""Every call gets the factors of its own weights: of other instances, of other threads, of weights that have changed."""

import logging
import threading

import pytest
import torch
from support.compiled import TOLERANCE, Block, compiled
from support.models.tiny import OPTIONS, error_of, factored, randn
from torch import nn

import dbf_compile
from dbf_compile.errors import ConversionError

THREADS, ROUNDS = 8, 40


def test_threads_with_models_of_one_class_get_their_own_answers():
    models, x = [Block(seed) for seed in range(THREADS)], randn(4, 70)
    expected = [factored(model)(x) for model in models]
    errors = [0.0] * THREADS
    start = threading.Barrier(THREADS)

    def work(index):
        start.wait()
        run = compiled(models[index])
        with torch.no_grad():
            for _ in range(ROUNDS):
                errors[index] = max(errors[index], error_of(run(x), expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(errors) < TOLERANCE


def test_weights_may_change_and_compilers_be_reset_while_others_call():
    still, moving, x = Block(1), Block(2), randn(4, 70)
    run, other = compiled(still), compiled(moving)
    expected = factored(still)(x)
    seen = []

    def call():
        for index in range(ROUNDS):
            seen.append(error_of(run(x), expected))
            if index == ROUNDS // 2:
                torch.compiler.reset()

    thread = threading.Thread(target=call)
    thread.start()
    for _ in range(3):
        moving.linear.weight.mul_(torch.linspace(-1, 2, 70))
        assert error_of(other(x), factored(moving)(x)) < TOLERANCE
    thread.join()
    assert max(seen) < TOLERANCE


def scaled(weight):
    return weight.detach() * torch.linspace(-1, 2, weight.shape[1])


def in_place(model):
    model.linear.weight.copy_(scaled(model.linear.weight))


def through_data(model):
    model.linear.weight.data.copy_(scaled(model.linear.weight))


def through_numpy(model):
    model.linear.weight.numpy()[:] = scaled(model.linear.weight).numpy()


def data_replaced(model):
    model.linear.weight.data = scaled(model.linear.weight)


def parameter_replaced(model):
    model.linear.weight = nn.Parameter(scaled(model.linear.weight), requires_grad=False)


def loaded(model):
    model.load_state_dict({"linear.weight": scaled(model.linear.weight)})


def loaded_by_assignment(model):
    model.load_state_dict({"linear.weight": scaled(model.linear.weight)}, assign=True)
    model.requires_grad_(False)


def swapped(model):
    weight = nn.Parameter(scaled(model.linear.weight), requires_grad=False)
    torch.utils.swap_tensors(model.linear.weight, weight)


def stepped(model):
    weight = model.linear.weight
    weight.requires_grad_(True).grad = weight.detach() - scaled(weight)
    torch.optim.SGD([weight], lr=1.0).step()
    weight.requires_grad_(False)


def storage_moved(model):
    storage, weight = model.linear.weight.untyped_storage(), model.linear.weight
    content = scaled(weight)
    storage.resize_(0)
    storage.resize_(content.untyped_storage().nbytes())
    weight.data.copy_(content)


CHANGES = [
    in_place,
    through_data,
    through_numpy,
    data_replaced,
    parameter_replaced,
    loaded,
    loaded_by_assignment,
    swapped,
    stepped,
    storage_moved,
]


@pytest.fixture(scope="module")
def expected():
    """What a block computes with changed weights."""
    model = Block(4)
    in_place(model)
    return factored(model)(randn(4, 70))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_weight_that_changes_in_whatever_way_is_factored_again(change, expected):
    model, x = Block(4), randn(4, 70)
    run = compiled(model)
    run(x)
    change(model)
    assert error_of(run(x), expected) < TOLERANCE


def test_a_weight_of_inference_mode_that_changes_is_factored_again(expected):
    with torch.inference_mode():
        model, x = Block(4), randn(4, 70)
        run = compiled(model)
        run(x)
        in_place(model)
        assert error_of(run(x), expected) < TOLERANCE


def test_memory_that_another_model_gets_is_not_taken_for_the_same_weight():
    x = randn(4, 70)
    compiled_block = torch.compile(lambda model, x: model(x), backend="dbf", options=OPTIONS)
    for seed in range(6):
        model = Block(seed)  # where the one before was
        assert error_of(compiled_block(model, x), factored(model)(x)) < TOLERANCE
        del model


def test_only_weights_that_have_changed_are_warned_of(caplog):
    models, x = [Block(seed) for seed in (1, 2, 3)], randn(4, 70)
    run = torch.compile(lambda model, x: model(x), backend="dbf", options=OPTIONS)
    with caplog.at_level(logging.WARNING, logger="dbf_compile"):
        for model in models * 2:
            run(model, x)
        models[0].linear.weight.mul_(1.0)  # another version, the same values
        run(models[0], x)
        assert not caplog.records
        models[1].linear.weight.mul_(torch.linspace(-1, 2, 70))
        run(models[1], x)
    assert "another one than at compilation" in caplog.text


@pytest.fixture
def checkpoint(tmp_path):
    """Factors of the two blocks of a stack."""
    factors = dbf_compile.factorize_model(
        nn.Sequential(Block(1), Block(2)), dbf_compile.CompressionConfig(**OPTIONS)
    )
    dbf_compile.save(factors, tmp_path / "factors.safetensors")
    return str(tmp_path / "factors.safetensors")


@pytest.mark.parametrize(
    "change", [in_place, data_replaced, parameter_replaced], ids=lambda change: change.__name__
)
def test_ready_factors_serve_their_own_weights_only(checkpoint, change):
    model, x = nn.Sequential(Block(1), Block(2)), randn(4, 70)
    for block in model:
        block.compile(backend="dbf", options=OPTIONS | {"checkpoint": checkpoint})
    expected = dbf_compile.convert_(nn.Sequential(Block(1), Block(2)), dbf_compile.load(checkpoint))(x)
    assert error_of(model(x), expected) < TOLERANCE
    change(model[1])
    with pytest.raises(ConversionError, match=r"another weight for 1\.linear than at compilation"):
        model(x)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"skip": ["1.*"]}, "stays dense"),
        ({"skip": ["0.*"]}, "is factored"),
        ({"overrides": {"1.linear": 8.0}}, "has other bits"),
    ],
)
def test_instances_that_share_code_must_share_their_options(options, difference):
    model, x = nn.Sequential(Block(1), Block(2)), randn(4, 70)
    for block in model:
        block.compile(backend="dbf", options=OPTIONS | options)
    with pytest.raises(ConversionError, match=rf"1\.linear, which by the options {difference}"):
        model(x)
