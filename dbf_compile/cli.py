"""``dbf-compile``: compress, judge, run and look at models from the command line.

Every command prints for people, or with ``--json`` one JSON object for programs. Exit status: 0 done, 1 it cannot be done
(the message says why and what to do), 2 wrong usage, 130 interrupted; what ``compress`` has done so far is kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Double Binary Factorization of transformer weights: 0.5 to 4 bits each, additions only.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Folder = Annotated[str, typer.Argument(help="Folder of a model, or its name on the Hub.")]
Data = Annotated[str | None, typer.Option(help="Text file to calibrate, or to judge, with.")]
_INTERRUPTED = 130


def main() -> None:
    """Run the command line, and turn errors into one line and an exit status."""
    from dbf_compile.errors import DBFError

    try:
        app(standalone_mode=True)
    except DBFError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _kept_on_interrupt(output: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; what is done lies in {output}.work: run the same command again to go on",
            file=sys.stderr,
        )
        raise typer.Exit(_INTERRUPTED) from None


@app.command(
    epilog="""Examples:

    dbf-compile compress Qwen/Qwen3-0.6B --bits 2 --data wiki.txt -o qwen-2bit

    dbf-compile compress ./llama --bits 1.5 --mode independent --preset fast -o llama-1.5bit
"""
)
def compress(
    model: Folder,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write; it does not exist yet.")],
    bits: Annotated[float, typer.Option(help="Stored bits per weight, scales counted.")] = 2.0,
    data: Data = None,
    mode: Annotated[
        str, typer.Option(help="auto, independent, or block: blocks make up for losses.")
    ] = "auto",
    preset: Annotated[
        str, typer.Option(help="fast, balanced or best: how long the factorizer searches.")
    ] = "balanced",
    budget: Annotated[
        str, typer.Option(help="equal bits for all weights, or allocated by measured error.")
    ] = "equal",
    windows: Annotated[int, typer.Option(help="Windows of text to calibrate with.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    resume: Annotated[str, typer.Option(help="auto, required, or never: start over.")] = "auto",
    processes: Annotated[int, typer.Option(help="Processes that share the work on this machine.")] = 1,
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cuda or cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other option, such as --set distill=0 or --set 'skip=[\"*head\"]'."),
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show progress bars with the time left.")] = True,
    as_json: AsJson = False,
) -> None:
    """Compress a pretrained model into a folder that loads like any other. A run that was stopped goes on."""
    from dbf_compile.run.compress import compress as run
    from dbf_compile.run.compress import compress_in_processes

    options: dict[str, Any] = {
        "bits": bits,
        "data": data,
        "mode": mode,
        "preset": preset,
        "budget": budget,
        "windows": windows,
        "length": length,
        "resume": resume,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "progress": progress and not as_json,
        **_settings(set_ or []),
    }
    with _kept_on_interrupt(output):
        if processes > 1:
            made = compress_in_processes(model, output, processes=processes, **options)
        else:
            made = run(model, output, **options)
    _print(as_json, dict(made.report), lambda: f"{made}\nreport: {made.folder / 'dbf_report.html'}")


@app.command(
    "eval",
    epilog="""Examples:

    dbf-compile eval qwen-2bit --data wiki.test.txt --dense Qwen/Qwen3-0.6B

    dbf-compile eval qwen-2bit --tasks arc_easy,piqa
""",
)
def evaluate(
    model: Folder,
    data: Data = None,
    dense: Annotated[str | None, typer.Option(help="The dense model, for KL and top-1 agreement.")] = None,
    length: Annotated[int, typer.Option(help="Context length: tokens of a window.")] = 2048,
    windows: Annotated[int, typer.Option(help="Windows at most; they do not overlap.")] = 10_000,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, joined by commas.")] = None,
    include_path: Annotated[
        str | None, typer.Option(help="A folder with tasks of your own, as YAML files of lm-eval.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of a task at most.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to, such as cuda or cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity at a stated context length, distance from the dense model, and tasks of lm-eval."""
    from dbf_compile.errors import OptionError
    from dbf_compile.evaluation import evaluate_folder

    if data is None and tasks is None:
        raise OptionError("neither data nor tasks", "one of them", "pass --data text.txt, or --tasks piqa")
    found = evaluate_folder(
        model,
        data=data,
        dense=dense,
        length=length,
        windows=windows,
        tasks=tasks.split(",") if tasks else (),
        include_path=include_path,
        limit=limit,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    _print(as_json, found, lambda: "\n".join(f"{key:>16}  {_figure(value)}" for key, value in found.items()))


@app.command(
    epilog="Example:\n\n    dbf-compile generate qwen-2bit 'Once upon a time' --dense Qwen/Qwen3-0.6B"
)
def generate(
    model: Folder,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="New tokens at most.")] = 64,
    sample: Annotated[bool, typer.Option(help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="Of drawing.")] = 1.0,
    dense: Annotated[str | None, typer.Option(help="Run the dense model beside it.")] = None,
    compiled: Annotated[bool, typer.Option(help="Compile decoding.")] = True,
    device: Annotated[str | None, typer.Option(help="Where to, such as cuda or cpu.")] = None,
    as_json: AsJson = False,
) -> None:
    """Stream text from a model, then say how many tokens a second prefill and decoding made, and in how much memory."""
    from dbf_compile.generation import generate as run

    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if sample else {}
    found = {}
    for name in (model, *([dense] if dense else [])):
        if not as_json:
            print(f"--- {name}\n{prompt}", end="", flush=True)
        made = run(
            name,
            prompt,
            max_new_tokens=max_new_tokens,
            stream=None if as_json else lambda text: print(text, end="", flush=True),
            compiled=compiled,
            device=device,
            **options,
        )
        found[name] = {"text": made.text, **made.summary()}
        if not as_json:
            print(
                f"\n--- prefill {made.prefill_rate:.1f} tokens/s, decode {made.decode_rate:.1f} tokens/s, "
                f"weights {made.weight_bytes / 1e6:.1f} MB, compiled in {made.compile_seconds:.1f} s"
            )
    if as_json:
        print(json.dumps(found))


@app.command(epilog="Example:\n\n    dbf-compile bench qwen-2bit --dense Qwen/Qwen3-0.6B")
def bench(
    model: Folder,
    dense: Annotated[str | None, typer.Option(help="The dense model, timed in turns with it.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    max_new_tokens: Annotated[int, typer.Option("--tokens", "-n", min=2, help="New tokens.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often; medians are printed.")] = 5,
    device: Annotated[str | None, typer.Option(help="Where to, such as cuda or cpu.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time prefill and decoding of a compressed model, and of the dense one in the same run."""
    from dbf_compile.generation import time_models

    names = [model, *([dense] if dense else [])]
    found = time_models(names, prompt_tokens, max_new_tokens, rounds, device)

    def table() -> str:
        lines = [f"{'':40}  prefill/s   decode/s   weights MB"]
        lines += [
            f"{name[-40:]:40}  {row['prefill_rate']:9.1f}  {row['decode_rate']:9.1f}  {row['weight_bytes'] / 1e6:11.1f}"
            for name, row in found.items()
        ]
        if dense:
            lines.append(
                f"decoding {found[model]['decode_rate'] / found[dense]['decode_rate']:.2f} times the dense model's"
            )
        return "\n".join(lines)

    _print(as_json, found, table)


@app.command(epilog="Example:\n\n    dbf-compile inspect qwen-2bit")
def inspect(model: Folder, as_json: AsJson = False) -> None:
    """Show what of a model is compressed: coverage, bits, and the error of every layer; checks the files as well."""
    from dbf_compile.inspection import inspect_folder

    found = inspect_folder(model)

    def text() -> str:
        head = [
            f"{found['model']}: {found['factored']:.3f} bits per weight in {found['share']:.1%} of the weights, "
            f"{found['file']:.3f} in the whole file",
            *(f"  dense: {row['share']:6.1%}  {row['name']} ({row['reason']})" for row in found["dense"][:8]),
            "",
            f"{'bits':>6} {'R':>6} {'error':>10}  layer",
        ]
        rows = [
            f"{row['bits_per_weight']:6.3f} {row['mid_features']:6d} {_figure(row.get('error')):>10}  {row['name']}"
            for row in found["layers"]
        ]
        return "\n".join(head + rows)

    _print(as_json, found, text)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can run, and what is missing; exit status 1 if something that is needed is."""
    from dbf_compile.doctor import examine

    found = examine()
    marks = {"good": "ok     ", "missing": "missing", "slow": "slow   "}
    _print(
        as_json,
        {item.name: {"state": item.state, "detail": item.detail} for item in found},
        lambda: "\n".join(f"{marks[item.state]}  {item.name:16}  {item.detail}" for item in found),
    )
    if any(item.state == "missing" and item.needed for item in found):
        raise typer.Exit(1)


def _settings(given: list[str]) -> dict[str, Any]:
    """Return options from ``name=value``; the value is JSON, or else a string."""
    from dbf_compile.errors import OptionError

    found: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise OptionError(f"--set {item}", "name=value", "for instance --set distill=0")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _print(as_json: bool, found: dict[str, Any], text: Callable[[], str]) -> None:
    print(json.dumps(found, default=str) if as_json else text())


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
