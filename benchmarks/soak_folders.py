"""Damaged folders and factor files: every load ends in the same tensors, a clear error or a warning about what changed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from soak_cases import (
    TINY,
    Campaign,
    Case,
    first_frames,
    in_processes,
    limit_memory,
    one_line,
    write_tiny_llama,
)
from soak_mutations import (
    IN_BYTES,
    IN_TENSORS,
    INDEX,
    Damage,
    Files,
    change_json,
    read_tensors,
    write_tensors,
)

import dbf_compile
from dbf_compile.errors import DBFError
from dbf_compile.linear import DoubleBinaryLinear

FACTORS = "factors.safetensors"
SHARDS = 3
IDS = torch.arange(1, 13)[None]
# Kinds of damage to a folder, and how often each is drawn beside the others.
KINDS = {
    "tensors": 45,
    "bytes": 22,
    "quantization_config": 14,
    "other fields of config.json": 6,
    "text of a JSON file": 4,
    "index": 6,
    "files of another model": 8,
    "files that are missing or something else": 5,
}


@dataclass(frozen=True)
class Target:
    """Something to load.

    Args:
        name: for the table.
        files: of the original.
        other: the files of another model of the same shapes.
        load: returns the tensors of a folder by name, and what the model answers, if it is one.
        tensors: of the original.
        answers: of the original.
    """

    name: str
    files: Files
    other: Files
    load: Callable[[Path], tuple[dict[str, torch.Tensor], torch.Tensor | None]]
    tensors: dict[str, torch.Tensor]
    answers: torch.Tensor | None


def run(seeds: Iterable[int], quick: bool) -> Iterator[Case]:
    """Yield the outcome of one damaged load for each seed."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        targets = _targets(Path(folder))
        yield from in_processes(seeds, partial(_case, targets, Path(folder)))


def _targets(folder: Path) -> list[Target]:
    process = multiprocessing.get_context("fork").Process(target=_write_originals, args=(folder,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the originals could not be written")
    targets = []
    for name, load in (
        ("folder", _load_folder),
        ("sharded folder", _load_folder),
        ("factor file", _load_factors),
    ):
        tensors, answers = load(folder / name / "0")
        files, other = (
            {path.name: path.read_bytes() for path in sorted((folder / name / seed).iterdir())}
            for seed in "01"
        )
        targets.append(Target(name, files, other, load, tensors, answers))
    return targets


def _write_originals(folder: Path) -> None:
    for seed in "01":
        dense = write_tiny_llama(folder / f"dense{seed}", int(seed))
        whole = folder / "folder" / seed
        whole.parent.mkdir(exist_ok=True)
        dbf_compile.compress(dense, whole, **{**TINY, "distill": 0})
        for name, files in (
            ("sharded folder", _sharded(whole)),
            ("factor file", {FACTORS: _factor_file(whole)}),
        ):
            (folder / name / seed).mkdir(parents=True)
            for file, content in files.items():
                (folder / name / seed / file).write_bytes(content)


def _sharded(folder: Path) -> Files:
    """Return the files of a folder with its weights in a few shards and an index."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    metadata, tensors = read_tensors(files.pop("model.safetensors"))
    places = {}
    for number in range(SHARDS):
        shard = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = dict(list(tensors.items())[number::SHARDS])
        files[shard] = write_tensors(metadata, part)
        places |= dict.fromkeys(part, shard)
    total = sum(len(tensor.data) for tensor in tensors.values())
    files[INDEX] = json.dumps({"metadata": {"total_size": total}, "weight_map": places}).encode()
    return files


def _factor_file(folder: Path) -> bytes:
    """Return a factor file of the layers of a folder."""
    layers = {
        name: layer.factors
        for name, layer in transformers.AutoModelForCausalLM.from_pretrained(folder).named_modules()
        if isinstance(layer, DoubleBinaryLinear)
    }
    dbf_compile.save(layers, folder.parent / FACTORS)
    return (folder.parent / FACTORS).read_bytes()


def _load_folder(folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return dict(model.state_dict()), model(IDS).logits


def _load_factors(folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    factors = dbf_compile.load(folder / FACTORS)
    return {
        f"{name}.{part}": tensor
        for name, layer in factors.items()
        for part, tensor in layer.tensors().items()
    }, None


# Damage


def damage(target: Target, random: Random) -> tuple[Files, Damage]:
    """Return the files with one damage, and what it is."""
    files = dict(target.files)
    weights = random.choice([name for name in files if name.endswith(".safetensors")])
    kinds = dict(KINDS)
    if target.name == "factor file":
        kinds = {
            name: kinds[name] for name in ("tensors", "bytes", "files that are missing or something else")
        }
    elif target.name == "folder":
        del kinds["index"]
    match random.choices(list(kinds), list(kinds.values()))[0]:
        case "tensors":
            kind = random.choice(list(IN_TENSORS))
            metadata, tensors = read_tensors(files[weights])
            try:
                text = IN_TENSORS[kind](tensors, random)
            except (IndexError, ValueError):  # a shard has no two layers, or no scale
                kind, text = "flipped bits", IN_TENSORS["flipped bits"](tensors, random)
            files[weights] = write_tensors(metadata, tensors)
            return files, Damage(kind, weights, text)
        case "bytes":
            kind = random.choice(list(IN_BYTES))
            files[weights], text = IN_BYTES[kind](files[weights], random)
            return files, Damage(kind, weights, text)
        case "quantization_config" as kind:
            config = json.loads(files["config.json"])
            part, text = change_json({kind: config.pop(kind)}, random)
            files["config.json"] = json.dumps({**config, **part}).encode()
            return files, Damage(kind, "config.json", text)
        case "other fields of config.json" as kind:
            config = json.loads(files["config.json"])
            kept = config.pop("quantization_config")
            config, text = change_json(config, random)
            files["config.json"] = json.dumps({**config, "quantization_config": kept}).encode()
            return files, Damage(kind, "config.json", text, config=True)
        case "index" as kind:
            index, text = change_json(json.loads(files[INDEX]), random)
            files[INDEX] = json.dumps(index).encode()
            return files, Damage(kind, INDEX, text)
        case "text of a JSON file" as kind:
            name = random.choice([one for one in ("config.json", INDEX) if one in files])
            content = bytearray(files[name])
            place = random.randrange(len(content))
            content[place:] = random.choice(
                (b"", b"", content[place + 1 :], random.randbytes(4) + content[place + 4 :])
            )
            files[name] = bytes(content)
            return files, Damage(kind, name, f"from byte {place} on", config=name == "config.json")
        case "files of another model" as kind:
            name = random.choice(
                [one for one in files if one.endswith(".safetensors") or one == "config.json"]
            )
            files[name] = target.other[name]
            return files, Damage(kind, name, name)
        case kind:
            return files, Damage(kind, *_without(files, weights, random))


def _without(files: Files, weights: str, random: Random) -> tuple[str, str]:
    """Remove or empty a file, or swap shards."""
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    name = random.choice([weights, weights, *(one for one in ("config.json", INDEX) if one in files)])
    match random.choice(("missing", "empty", "swapped")):
        case "swapped" if len(shards) > 1:
            one, other = random.sample(shards, 2)
            files[one], files[other] = files[other], files[one]
            return one, f"{one} and {other} swapped"
        case "empty":
            files[name] = b""
            return name, f"{name} is empty"
        case _:
            del files[name]
            return name, f"no {name}"


# Outcomes


def _case(targets: list[Target], folder: Path, seed: int) -> Case:
    limit_memory()
    random = Random(seed)
    target = random.choices(targets, (40, 25, 35))[0]
    files, done = damage(target, random)
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        for name, content in files.items():
            (place / name).write_bytes(content)
        outcome, bad, detail = _outcome(target, place, done)
    finally:
        shutil.rmtree(place)
    return Case(seed, f"{target.name}: {done.kind}", outcome, bad, f"{done.text}: {detail}")


def _outcome(target: Target, place: Path, done: Damage) -> tuple[str, bool, str]:
    with _said() as said:
        try:
            tensors, answers = target.load(place)
        except Exception as error:
            return _outcome_of_error(error, target, place, done, " ".join(said))
    changed = _changed(target.tensors, tensors)
    text = " ".join(said)
    if not changed:
        if target.answers is None or torch.equal(answers, target.answers):
            return "same tensors", False, ""
        if done.config:
            return "same tensors, another setting of the dense model", False, ""
        return "SAME TENSORS, OTHER ANSWERS", True, text[:400]
    if done.file in text or all(_neutral(name) in _neutral(text) for name in changed):
        return "a warning about what changed", False, ""
    return "ANOTHER MODEL", True, f"{len(changed)} tensors differ, such as {changed[0]}; said: {text[:300]}"


def _outcome_of_error(
    error: Exception, target: Target, place: Path, done: Damage, said: str
) -> tuple[str, bool, str]:
    text, short = str(error), one_line(error)
    ours = any("/dbf_compile/" in frame.filename for frame in first_frames(error))
    names_it = str(place) in text or done.file in text
    if isinstance(error, DBFError):
        return ("a clear error", False, "") if names_it else ("AN ERROR WITHOUT A FILE", True, short)
    if done.config and not ours:
        return "an error of transformers about its own configuration", False, ""
    if not ours and names_it:
        return "an error of transformers that names the file", False, ""
    if not ours and done.kind == "quantization_config":
        # transformers chooses the quantizer by this record: without its quant_method it knows of none, nor of us.
        return f"told by transformers before any code of ours is asked: {short}", False, ""
    # Its report of all that did not fit comes before the error.
    if not ours and any(_neutral(name) in _neutral(said) for name in target.tensors):
        return "an error of transformers whose report names tensors", False, ""
    return "AN UNCLEAR ERROR", True, short


def _changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that differ, or are in one of both alone; more digits or fewer are no difference."""

    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        if one.shape != other.shape or other.device.type == "meta":
            return False
        if one.dtype == other.dtype or not one.is_floating_point():
            return one.dtype == other.dtype and torch.equal(one, other)
        return torch.allclose(one.float(), other.float(), rtol=0.01, atol=1e-4)

    both = before.keys() & after.keys()
    return sorted(
        {*(before.keys() ^ after.keys()), *(name for name in both if not same(before[name], after[name]))}
    )


def _neutral(text: str) -> str:
    """Return a text without numbers: lists of tensors name several layers at once."""
    return re.sub(r"\{[\d, .…]+\}|\d+", "#", text)


@contextmanager
def _said() -> Iterator[list[str]]:
    """Collect what is logged as a warning or worse, and Python's warnings."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "dbf_compile", "safetensors")]
    show: Any = lambda message, *_, **__: said.append(str(message))  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        for logger in loggers:
            logger.handlers, logger.propagate = [handler], False
        yield said


CAMPAIGN = Campaign("loads", 10_000, 12, run)
