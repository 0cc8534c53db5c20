"""``dbf-compile``: compress, judge, run and look at models from the command line.

Every command prints for people, or with ``--json`` one JSON object for programs. Exit status: 0 done, 1 it cannot be done
(the message says why and what to do), 2 wrong usage, 130 interrupted; what ``compress`` has done so far is kept.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from dbf_compile import cli_text
from dbf_compile.calibration.kinds import OTHER, parse_sources
from dbf_compile.cli_options import (
    AsJson,
    Folder,
    Progress,
    Trust,
    as_json_text,
    compared,
    expand_records,
    parse_settings,
    results_alone,
)
from dbf_compile.files import user_path
from dbf_compile.machine import has_peers
from dbf_compile.options import CompressOptions, EvaluationConfig, FinetuneConfig
from dbf_compile.progress import say
from dbf_compile.records import Record, option, resolve
from dbf_compile.terminal import complete_output, deliver_interrupts, prepare_streams

app = typer.Typer(
    help="Double Binary Factorization of transformer weights: 0.5 to 4 bits each, additions only.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text to calibrate, or to judge, with: a file of text or of rows (txt, jsonl, json, csv, tsv, parquet, arrow, "
        "also compressed), a folder or a pattern of such files, or a data set of the Hub as name or name:configuration. "
        "- is stdin. May be repeated, and told apart by kind of text as kind=source: encyclopedia, web, stories, code, dialogues, or a name "
        "of your own."
    ),
]
_INTERRUPTED = 130


def main() -> None:
    """Run the command line, and turn errors into one line and an exit status."""
    from dbf_compile.doctor import EXTRAS
    from dbf_compile.errors import DBFError

    prepare_streams()
    deliver_interrupts()
    warnings.showwarning = _warn
    try:
        with complete_output():
            app(standalone_mode=True)
    except DBFError as error:
        _fail(str(error))
    except BrokenPipeError:  # what reads the output has enough
        sys.exit(1)
    except OSError as error:
        _fail(f"{error}; allowed: files that can be read, and written where that is asked; look at this one")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra, use = EXTRAS[error.name]
        _fail(f"no package {error.name}; needed for {use}; pip install 'dbf-compile[{extra}]'")


def _fail(message: str) -> NoReturn:
    print("error:", " ".join(line.strip() for line in message.splitlines()), file=sys.stderr)
    sys.exit(1)


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Say a warning as users read it: without the place in our code; what will change in a library is for who programs it."""
    if not issubclass(category, (FutureWarning, DeprecationWarning)):
        say(f"warning: {message}", True)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"dbf-compile {version('dbf_compile')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


@contextmanager
def _kept_on_interrupt(output: str) -> Iterator[None]:
    from dbf_compile.run.output import work_folder

    try:
        yield
    except KeyboardInterrupt:
        work = work_folder(user_path(output))
        kept = (
            f"what is done lies in {work}: run the same command again to continue"
            if work.is_dir()
            else "nothing was done yet"
        )
        print(f"\ninterrupted; {kept}", file=sys.stderr)
        raise typer.Exit(_INTERRUPTED) from None


@app.command(
    epilog="""Examples:

    dbf-compile compress Qwen/Qwen3-0.6B --bits 2 --data wiki.txt -o qwen-2bit

    dbf-compile compress ./llama --bits 1.5 --mode independent --preset fast -o llama-1.5bit

    dbf-compile compress ./llama --bits 2 --data code=src.py --data web=pages.jsonl --shares '{"code": 2}' -o llama-2bit
"""
)
@expand_records
def compress(
    model: Folder,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write; it does not exist yet.")],
    options: CompressOptions,
    data: Data = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of this machine that share the work.")] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any option as name=JSON, such as --set 'skip=[\"*head\"]'."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compress a pretrained model into a folder that loads like any other. A run that was stopped continues."""
    from dbf_compile.run.compress import compress as run
    from dbf_compile.run.workers import compress_in_processes

    config = resolve(CompressOptions, options, parse_settings(settings or []))
    source = _source(data)
    with _kept_on_interrupt(output), results_alone(as_json):
        if processes > 1:
            compressed = compress_in_processes(model, output, processes=processes, config=config, data=source)
        else:
            compressed = run(model, output, config=config, data=source)
    page = compressed.folder / "dbf_report.html"
    _print(as_json, compressed.report, lambda: f"{compressed}\nreport: {page}")


@app.command(
    epilog="""Examples:

    dbf-compile finetune qwen-2bit --data web=pages.jsonl --data code=src.py --tokens 2000000

    dbf-compile finetune qwen-2bit --tokens 200000

    torchrun --nproc-per-node 8 -m dbf_compile.cli finetune qwen-2bit --data text.jsonl --batch 64
"""
)
@expand_records
def finetune(
    model: Folder,
    options: FinetuneConfig,
    data: Data = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder to write; None for MODEL-finetuned.")
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="The dense model; None for the one that MODEL was compressed from.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a compressed folder end to end: signs, scales and norms learn the dense model's predictions."""
    from dbf_compile.finetuning.folders import default_output
    from dbf_compile.finetuning.folders import finetune as run

    place = output or str(default_output(model))
    with _kept_on_interrupt(place), results_alone(as_json):
        result = run(model, _source(data), place, dense=dense, config=options)
    _print(as_json, asdict(result), lambda: str(result))


@app.command(
    "eval",
    epilog="""Examples:

    dbf-compile eval qwen-2bit --data wiki.test.txt --dense Qwen/Qwen3-0.6B

    dbf-compile eval qwen-2bit --data web=pages.jsonl --data code=src.py --dense Qwen/Qwen3-0.6B

    dbf-compile eval qwen-2bit --tasks arc_easy,piqa
""",
)
@expand_records
def evaluate(
    model: Folder,
    options: EvaluationConfig,
    data: Data = None,
    dense: Annotated[str | None, typer.Option(help="The dense model, for KL and top-1 agreement.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity at a stated context length, distance from the dense model, and tasks of lm-eval."""
    from dbf_compile.evaluation import evaluate as run

    tasks = tuple(name for names in options.tasks for name in names.split(","))
    with results_alone(as_json):
        results = run(model, _source(data), dense=dense, config=replace(options, tasks=tasks))
    from dbf_compile.cli_tables import evaluation_lines

    _print(as_json, results, lambda: "\n".join(evaluation_lines(results)))


app.command(
    epilog="""Examples:

    dbf-compile generate qwen-2bit 'Once upon a time' --dense Qwen/Qwen3-0.6B

    dbf-compile generate qwen-2bit --chat 'Why is the sky blue?' --temperature 0.7 --stop '###'

    dbf-compile generate qwen-2bit --prompt-file prompts.txt --json
"""
)(cli_text.generate)

app.command(
    epilog="""Examples:

    dbf-compile chat qwen-2bit --system 'Answer in one sentence.'

    dbf-compile chat qwen-2bit --temperature 0.3 < questions.txt > answers.txt
"""
)(cli_text.chat)


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Record):
    """How ``bench`` measures.

    Args:
        prompt_tokens: Tokens of the prompt.
        rounds: How often; medians are printed.
        energy: Measure the joules of a new token, too, on an otherwise quiet machine with counters of energy.
        device: Where to compute, such as cuda or cpu; None for a GPU if there is one.
        trust_remote_code: Run code that comes with the model.
        progress: Show on stderr what goes on.
    """

    prompt_tokens: int = option(128, low=1)
    rounds: int = option(5, low=1)
    energy: bool = False
    device: str | None = None
    trust_remote_code: bool = False
    progress: bool = True


@app.command(epilog="Example:\n\n    dbf-compile bench qwen-2bit --dense Qwen/Qwen3-0.6B")
@expand_records
def bench(
    model: Folder,
    options: BenchOptions,
    dense: Annotated[str | None, typer.Option(help="The dense model, timed in turns with it.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--tokens", "-n", min=2, help="New tokens.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Time prefill and decoding of a compressed model, and of the dense one in the same run."""
    from dbf_compile.cli_tables import energy_lines
    from dbf_compile.generation import time_models

    settings = (
        compared(model, dense),
        options.prompt_tokens,
        max_new_tokens,
        options.rounds,
        options.device,
        options.progress,
        options.trust_remote_code,
    )
    results: dict[str, dict[str, Any]] = {**time_models(*settings)}
    if options.energy:
        from dbf_compile.energy import energy_of_models

        for name, figures in energy_of_models(*settings).items():
            results[name]["energy"] = asdict(figures)

    def table() -> str:
        lines = [f"{'':40}  prefill/s   decode/s   weights MB"]
        lines += [
            f"{name[-40:]:40}  {row['prefill_rate']:9.1f}  {row['decode_rate']:9.1f}  {row['weight_bytes'] / 1e6:11.1f}"
            for name, row in results.items()
        ]
        if dense:
            lines.append(
                f"decoding {results[model]['decode_rate'] / results[dense]['decode_rate']:.2f} times the dense model's"
            )
        return "\n".join(lines + energy_lines(results))

    _print(as_json, results, table)


@app.command(epilog="Example:\n\n    dbf-compile inspect qwen-2bit")
def inspect(
    model: Folder, trust_remote_code: Trust = False, progress: Progress = True, as_json: AsJson = False
) -> None:
    """Show what of a model is compressed: coverage, bits, and the error of every layer; compares the files with what was written."""
    from dbf_compile.cli_tables import LAYER_HEAD, layer_cells, operation_lines
    from dbf_compile.inspection import inspect as run

    facts = run(model, trust_remote_code, progress)

    def text() -> str:
        head = [
            f"{facts['model']}: {facts['factored']:.3f} bits per weight in {facts['share']:.1%} of the weights, "
            f"{facts['file']:.3f} in the whole file",
            "all files are as they were written"
            if facts["verified"]
            else "a file was saved again since, so files were not compared with what was written",
            *(f"  dense: {row['share']:6.1%}  {row['name']} ({row['reason']})" for row in facts["dense"][:8]),
            "",
            *operation_lines(facts["operations"]),
            "",
            f"{'bits':>6} {'R':>6} {'error':>10} {LAYER_HEAD}  layer",
        ]
        rows = [
            f"{row['bits_per_weight']:6.3f} {row['mid_features']:6d} {_figure(row.get('error')):>10} "
            f"{layer_cells(row['operations'])}  {row['name']}"
            for row in facts["layers"]
        ]
        return "\n".join(head + rows)

    _print(as_json, facts, text)


@app.command()
def doctor(progress: Progress = True, as_json: AsJson = False) -> None:
    """Say what this machine can run, and what is missing; exit status 1 if something that is needed is."""
    from dbf_compile.doctor import examine

    say("looking at this machine; the CPU kernels are built if they are not there yet", progress)
    findings = examine()
    marks = {"good": "ok     ", "missing": "missing", "slow": "slow   "}
    _print(
        as_json,
        {item.name: {"state": item.state, "detail": item.detail} for item in findings},
        lambda: "\n".join(f"{marks[item.state]}  {item.name:16}  {item.detail}" for item in findings),
    )
    if any(item.state == "missing" and item.needed for item in findings):
        raise typer.Exit(1)


def _source(data: list[str] | None) -> Any:
    """Return one path or name, which may be one of the Hub, several paths, or paths by kind of text."""
    if not data:
        return None
    data = ["/dev/stdin" if path == "-" else path for path in data]
    kinds = parse_sources(data)
    if list(kinds) == [OTHER]:
        return data[0] if len(data) == 1 else [Path(path) for path in data]
    return {kind: [Path(path) for path in paths] for kind, paths in kinds.items()}


def _print(as_json: bool, facts: dict[str, Any], text: Callable[[], str]) -> None:
    if not (has_peers() and os.environ["RANK"] != "0"):  # one says what all have done
        print(as_json_text(facts) if as_json else text())


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
