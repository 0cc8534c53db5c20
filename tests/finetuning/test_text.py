"""Text: kinds take turns, every window is used once, the last ones of a kind are kept back."""

import pytest
import torch

pytest.importorskip("transformers")

from support.models.tiny import tiny_llama

from dbf_compile.calibration.kinds import OWN_TEXT
from dbf_compile.errors import ConversionError, OptionError
from dbf_compile.finetuning.text import Text
from dbf_compile.options import CompressOptions, FinetuneConfig
from dbf_compile.run.own_text import OwnText
from dbf_compile.run.work import Work

KINDS = {"web": [list(range(1, 61))], "code": [list(range(101, 241))]}


def read(data=KINDS, **options):
    settings = {"length": 10, "holdout": 2, "tokens": 1000, "progress": False, **options}
    return Text.read(data, None, tiny_llama(1), FinetuneConfig(**settings))


def test_the_last_windows_of_every_kind_are_kept_back_and_the_others_used_once():
    text = read()  # of six windows no more than a fifth is kept back
    assert [windows[:, 0].tolist() for windows in text.judging.values()] == [[51], [221, 231]]
    assert sorted(text.learning[:, 0].tolist()) == [*range(1, 51, 10), *range(101, 221, 10)]
    few = read(tokens=10, holdout=2)  # is no reason to judge with fewer
    assert few.learning[:, 0].tolist() == [1] and few.judging["code"][:, 0].tolist() == [181, 191]


def test_files_of_a_kind_take_turns(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for start, path in zip((1, 101), paths, strict=True):
        path.write_text(f'{{"input_ids": {list(range(start, start + 80))}}}\n')
    for data in (paths, {"code": paths}, [str(path) for path in paths]):
        text = read(data, tokens=40, holdout=1)
        (judging,) = text.judging.values()
        assert judging[:, 0].tolist() == [21]
        assert sorted(text.learning[:, 0].tolist()) == [1, 11, 101, 111]


def test_kinds_take_turns_as_far_as_tokens_are_asked_for():
    assert sorted(read(tokens=60).learning[:, 0].tolist()) == [1, 11, 21, 101, 111, 121]


def test_the_order_follows_from_the_seed():
    assert torch.equal(read(seed=3).learning, read(seed=3).learning)
    assert not torch.equal(read(seed=3).learning, read(seed=4).learning)


def test_text_that_leaves_nothing_to_learn_from_is_refused():
    with pytest.raises(ConversionError, match="web: a text of one window of 10 tokens"):
        read({"code": [list(range(100))], "web": [list(range(19))]})
    with pytest.raises(OptionError, match="no data, and own_text=0"):
        read(None, own_text=0.0)
    with pytest.raises(ConversionError, match="web"):  # a kind by its name
        read({"web": [[1, 2]], "code": [list(range(100))]})


def test_without_data_the_dense_model_writes_all_and_beside_it_what_is_asked_for(tmp_path):
    model, options = tiny_llama(1), {"length": 10, "holdout": 2, "tokens": 80, "progress": False}
    assert read().own is None
    for data, own, sizes in (
        (None, {}, {OWN_TEXT: 2}),
        (KINDS, {"own_text": 0.25}, {"web": 1, "code": 2, OWN_TEXT: 1}),
    ):
        config = FinetuneConfig(**options, **own)
        planned = Text.read(data, None, model, config)
        work = Work(tmp_path / str(len(sizes)), {"text": planned.hash()})
        text = planned.written(model, work, torch.device("cpu"), config)
        assert text.learning.shape == (8, 10) and text.learning.dtype == torch.int32 and text.own is None
        assert {kind: len(windows) for kind, windows in text.judging.items()} == sizes
        again = Text.read(data, None, model, config).written(model, work, torch.device("cpu"), config)
        assert torch.equal(again.learning, text.learning)


def test_own_text_is_not_that_which_the_model_was_calibrated_with():
    config = FinetuneConfig(length=10, tokens=80, seed=3)
    own = Text.read(None, None, tiny_llama(1), config).own
    same = CompressOptions(length=10, seed=3)
    calibrated = OwnText.of(tiny_llama(1), None, same, 10, (own.calibrating, own.judging))
    texts = [set(map(tuple, one.writer.write(range(4)).tolist())) for one in (own, calibrated)]
    assert texts[0].isdisjoint(texts[1])


def test_the_name_of_own_text_is_no_kind_of_data(tmp_path):
    with pytest.raises(OptionError, match="data of the kind 'own text'"):
        read({OWN_TEXT: tmp_path / "a.txt"})
