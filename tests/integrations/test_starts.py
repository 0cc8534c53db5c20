"""Starts: a process that finds one writes what the model writes, without opening it; whatever changed, the model is opened."""

import mmap
import os
import shutil
import subprocess
import sys

import pytest
import torch
from support.models.chat import TEMPLATE
from support.models.pretrained import QUICK, tiny_folder

import dbf_compile
from dbf_compile import huge_pages
from dbf_compile.chat import open_conversation
from dbf_compile.generation import TextGenerator
from dbf_compile.integrations import pretrained, starts

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # programs are compiled
PROMPT, TOGETHER = "add the signs", ["add the signs", "of", "twice"]
ALL = list(range(256))  # whatever the first token is, it ends the text


@pytest.fixture(scope="module", autouse=True)
def small_pages():
    """Huge pages that models as small as these fill, so that their weights are moved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huge_pages, "_PAGE", 2**12)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A compressed folder, and a cache with its programs, but none for several rows."""
    place = tmp_path_factory.mktemp("starts")
    dense = tiny_folder(place / "dense", layers=1)
    folder = place / "folder"
    dbf_compile.compress(dense, folder, **QUICK)
    dbf_compile.compress(dense, place / "other", seed=1, **QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DBF_CACHE_DIR", str(place / "cache"))
        generator = generator_of(folder)
        text = generator.generate(PROMPT, max_new_tokens=8).text
    assert list((place / "cache" / "starts").iterdir())
    return folder, place / "cache", text


@pytest.fixture
def cache(made, tmp_path, monkeypatch):
    """A copy of that cache."""
    shutil.copytree(made[1], tmp_path / "cache")
    monkeypatch.setenv("DBF_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def opened(monkeypatch):
    """Which folders are opened."""
    names, open_any = [], pretrained.open_any

    def noted(folder, trust=False):
        names.append(folder)
        return open_any(folder, trust)

    monkeypatch.setattr(pretrained, "open_any", noted)
    return names


def generator_of(folder, **options):
    return TextGenerator(folder, device="cpu", progress=False, **options)


def copied(folder, tmp_path):
    """A folder of its own, of which no start is kept yet; "other" beside it has other weights."""
    for name in ("folder", "other"):
        shutil.copytree(folder.parent / name, tmp_path / name)
    return tmp_path / "folder"


def test_a_start_writes_what_the_model_writes_without_opening_it(made, cache, opened):
    folder, _, text = made
    generator = generator_of(folder)
    generation = generator.generate(PROMPT, max_new_tokens=8)
    assert generation.text == text
    assert generator.generate(PROMPT + " of", max_new_tokens=2).known_tokens > 0
    assert opened == []
    model = pretrained.open_any(folder)
    assert generator.about.limits == dbf_compile.calibration.limits.Limits.of(model)
    assert generation.weight_bytes == dbf_compile.text_model.weight_bytes(model)
    assert (generator.about.name, generator.about.device) == (type(model).__name__, model.device)
    assert generator.about.generation_config.to_dict() == model.generation_config.to_dict()
    ours, theirs = generator.tokenizer, pretrained.tokenizer_of(folder)
    assert type(ours) is type(theirs) and ours(PROMPT)["input_ids"] == theirs(PROMPT)["input_ids"]


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages")
@pytest.mark.parametrize("stored", [True, False])
def test_weights_that_are_read_lie_in_huge_pages(made, cache, monkeypatch, stored):
    asked = []
    whole = huge_pages._copies

    def noted(tensors):
        for name, copy in whole(tensors):
            asked.append(copy.data_ptr())
            yield name, copy

    monkeypatch.setattr(huge_pages, "_copies", noted)
    generator = generator_of(made[0])
    if not stored:
        assert generator.model is generator.about.source
    assert generator.generate(PROMPT, max_new_tokens=8).text == made[2]
    source = generator.about.source
    weights = dict((*source.named_parameters(), *source.named_buffers()))
    assert sum(tensor.data_ptr() in asked for tensor in weights.values()) > len(weights) / 2


def test_a_start_imports_no_code_of_models(made, cache):
    program = (
        "import sys, dbf_compile\n"
        f"text = dbf_compile.generate({str(made[0])!r}, {PROMPT!r}, max_new_tokens=8, device='cpu', progress=False).text\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'transformers.modeling_utils'} & set(sys.modules)\n"
        "print(repr((text, heavy)))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout.strip() == repr((made[2], set()))


def test_what_has_no_program_yet_opens_the_model_once(made, cache, opened):
    folder = made[0]
    texts = [each.text for each in generator_of(folder).generate(TOGETHER, max_new_tokens=8)]
    assert opened == [folder] and texts[0] == made[2]
    again = [each.text for each in generator_of(folder).generate(TOGETHER, max_new_tokens=8)]
    assert again == texts and opened == [folder]


def test_who_asks_for_the_model_gets_it_and_what_they_do_to_it_counts(made, cache, opened):
    generator = generator_of(made[0])
    before = generator.generate(PROMPT, max_new_tokens=8).text
    with torch.no_grad():
        generator.model.model.norm.weight.neg_()
    assert opened == [made[0]]
    assert generator.generate(PROMPT, max_new_tokens=8).text != before
    assert generator_of(made[0]).generate(PROMPT, max_new_tokens=8).text == made[2]


def test_options_that_our_loop_lacks_open_the_model(made, cache, opened, monkeypatch):
    monkeypatch.setattr("dbf_compile.integrations.generate._compilation", lambda model, compiled: {})
    generation = generator_of(made[0]).generate(PROMPT, max_new_tokens=4, no_repeat_ngram_size=2)
    assert opened == [made[0]] and generation.new_tokens == 4


def changed_weights(folder):
    shutil.copytree(folder.parent / "other", folder, dirs_exist_ok=True)


def changed_settings(folder):
    settings = transformers.GenerationConfig.from_pretrained(folder)
    settings.eos_token_id = ALL
    settings.save_pretrained(folder)


def other_file(folder):
    (folder / "another").write_text("")


@pytest.mark.parametrize("change", [changed_weights, changed_settings, other_file])
def test_a_folder_that_changed_is_opened(made, cache, opened, tmp_path, change):
    folder = copied(made[0], tmp_path)
    assert generator_of(folder).generate(PROMPT, max_new_tokens=8).text == made[2]  # keeps a start
    assert not generator_of(folder).about.is_open
    change(folder)
    assert starts.load(folder) is None
    generator = generator_of(folder)
    assert opened == [folder, folder]
    assert (generator.generate(PROMPT, max_new_tokens=8).text == made[2]) == (change is other_file)


def weight(model):
    with torch.no_grad():
        model.model.norm.weight.neg_()


def buffer(model):
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.mul_(3)


def parameter(model):
    model.model.norm.weight = torch.nn.Parameter(-model.model.norm.weight.detach())


def mode(model):
    model.model.norm.train()


@pytest.mark.parametrize("change", [weight, buffer, parameter, mode])
def test_a_model_that_is_not_as_it_was_opened_is_not_kept(made, cache, tmp_path, change):
    folder = copied(made[0], tmp_path)
    generator = generator_of(folder)
    change(generator.model)
    generator.generate(PROMPT, max_new_tokens=2)
    assert starts.load(folder) is None


def test_settings_are_kept_as_they_were_opened(made, cache, tmp_path):
    folder = copied(made[0], tmp_path)
    generator = generator_of(folder)
    generator.model.generation_config.eos_token_id = ALL
    assert generator.generate(PROMPT, max_new_tokens=8).text != made[2]
    again = generator_of(folder)
    assert not again.about.is_open and again.generate(PROMPT, max_new_tokens=8).text == made[2]


def emptied(cache):
    for file in (cache / "starts").iterdir():
        file.write_bytes(b"")


def flipped(cache):
    for file in (cache / "starts").iterdir():
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("damage", [emptied, flipped])
def test_damaged_starts_are_made_again(made, cache, opened, damage):
    damage(cache)
    assert generator_of(made[0]).generate(PROMPT, max_new_tokens=8).text == made[2]
    assert opened == [made[0]]


@pytest.mark.parametrize("options", [{"compiled": False}, {"trust_remote_code": True}])
def test_who_wants_it_otherwise_gets_the_model(made, cache, opened, options):
    assert generator_of(made[0], **options).generate(PROMPT, max_new_tokens=2).new_tokens == 2
    assert opened == [made[0]]


def test_conversations_start_too_and_a_missing_template_is_found_before(made, cache, opened, tmp_path):
    folder = copied(made[0], tmp_path)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    answers = []
    for _ in range(2):
        conversation = open_conversation(folder, device="cpu", progress=False)
        answers.append(conversation.ask(PROMPT, max_new_tokens=8).text)
    assert answers[0] == answers[1] and opened == [folder]
    with pytest.raises(dbf_compile.errors.ConversionError, match="no chat template"):
        open_conversation(made[0], device="cpu", progress=False)
    assert opened == [folder]


def test_a_tokenizer_that_its_class_cannot_open_is_left_to_the_next_start(monkeypatch, tmp_path):
    def broken(*_):
        raise Exception("data did not match any variant")  # as tokenizers does

    tokenizer = transformers.PreTrainedTokenizerFast
    monkeypatch.setattr(starts, "_tokenizer", broken)
    assert starts._class_of(tmp_path, tokenizer.__new__(tokenizer)) is None
