"""Campaigns that look for faults nobody sees: other tensors without a word, other folders, other answers, stray reads.

    make soak                                     all four at full size: about two hours on two cores
    python benchmarks/soak.py folders --size 500
    python benchmarks/soak.py folders --seed 17   one case again
    python benchmarks/soak.py --quick             some seconds each; writes nothing

    folders       damaged folders and factor files: every load ends in the same tensors, a clear error or a warning
    kills         killed compressions, and full disks: resumed, they end in the same folder
    threads       eight threads, four models, changing weights: every answer is right
    sanitizers    the C++ kernels on random shapes: right, and nothing out of bounds

Every case follows from its seed. Cases are kept in out/soak/ as they end: a campaign that is stopped goes on, unless the
program was edited in between. Tables: benchmarks/results/soak.md, soak.csv, and soak.bad.csv with every bad case.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import importlib
import io
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before torch reads it, here and in every process that a campaign starts: forked children must find no threads.
os.environ["OMP_NUM_THREADS"] = "1"

from measure import RESULTS, commit, processor, versions
from soak_cases import Campaign, Case

from dbf_compile.files import write_text

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "out" / "soak"
CAMPAIGNS = ("folders", "kills", "threads", "sanitizers")
SHOWN = 20  # bad cases of a campaign in soak.md; soak.bad.csv has all
PROGRESS_SECONDS = 30


class Journal:
    """The cases of one campaign, kept as they end.

    Args:
        path: of the file; what another program or machine began is set aside.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds = 0.0
        self.cases: list[Case] = []
        header = {"program": _program_hash(), "machine": processor(), "versions": versions()}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[0]) != header:
            path.replace(path.with_suffix(".old"))
            print(f"{path.name} is of another program or machine: kept as {path.with_suffix('.old').name}")
            lines = []
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except ValueError:  # the last line, of a campaign that was killed while it wrote
                continue
            self.seconds += entry.pop("seconds")
            self.cases.append(Case(**entry))
        complete = [json.dumps(header), *(line for line in lines[1:] if line.endswith("}"))]
        write_text(path, "".join(f"{line}\n" for line in complete))

    def add(self, case: Case, seconds: float) -> None:
        """Keep a case, and the seconds since the one before."""
        self.cases.append(case)
        self.seconds += seconds
        with self._path.open("a") as file:
            file.write(json.dumps({**asdict(case), "seconds": round(seconds, 3)}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaigns", nargs="*", metavar="campaign", help=", ".join(CAMPAIGNS))
    parser.add_argument(
        "--size", type=int, help="loads, kills, calls or seconds; the default is the full size"
    )
    parser.add_argument("--quick", action="store_true", help="a few cases; nothing is kept or written")
    parser.add_argument("--seed", type=int, help="this case alone, with all that it tells")
    options = parser.parse_args()
    unknown = sorted({*options.campaigns} - {*CAMPAIGNS})
    if unknown:
        parser.error(f"campaign {unknown[0]!r}; there are {', '.join(CAMPAIGNS)}")
    bad = 0
    for name in options.campaigns or CAMPAIGNS:
        campaign: Campaign = importlib.import_module(f"soak_{name}").CAMPAIGN
        if options.seed is not None:
            os.environ["SOAK_SHOW"] = "1"
            for case in campaign.run([options.seed], options.quick):
                print(json.dumps(asdict(case), indent=1))
                bad += case.bad
        elif options.quick:
            cases = list(_until(campaign.quick, campaign.run(itertools.count(), True)))
            print(_line(name, campaign, cases))
            bad += sum(case.bad for case in cases)
        else:
            bad += _run(name, campaign, options.size or campaign.size)
    if options.quick:
        print("quick: rows of soak not written")
    raise SystemExit(1 if bad else 0)


def _until(size: int, cases: Iterator[Case]) -> Iterator[Case]:
    """Yield cases until their amounts add up to ``size``."""
    amount = 0
    for case in cases:
        yield case
        amount += case.amount
        if amount >= size:
            break
    cases.close()  # type: ignore[attr-defined]  # ends what still runs


def _run(name: str, campaign: Campaign, size: int) -> int:
    """Run a campaign, or what is left of it; write the tables; return the number of bad cases."""
    journal = Journal(KEPT / f"{name}.jsonl")
    left = size - sum(case.amount for case in journal.cases)
    if left > 0:
        done = {case.seed for case in journal.cases}
        seeds = (seed for seed in itertools.count() if seed not in done)
        last = shown = time.monotonic()
        for case in _until(left, campaign.run(seeds, False)):
            now = time.monotonic()
            journal.add(case, now - last)
            last = now
            if case.bad:
                print(
                    f"{name} --seed {case.seed}: {case.what}: {case.outcome}: {case.detail[:300]}", flush=True
                )
            if now - shown > PROGRESS_SECONDS:
                shown = now
                print(_line(name, campaign, journal.cases), flush=True)
    print(_line(name, campaign, journal.cases), flush=True)
    _write_tables(name, campaign, journal)
    return sum(case.bad for case in journal.cases)


def _line(name: str, campaign: Campaign, cases: list[Case]) -> str:
    outcomes: dict[str, int] = {}
    for case in cases:
        outcomes[case.outcome] = outcomes.get(case.outcome, 0) + 1
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    return f"{name}: {sum(case.amount for case in cases)} {campaign.unit}, {len(cases)} cases: {counts}"


def _write_tables(name: str, campaign: Campaign, journal: Journal) -> None:
    counts: dict[tuple[str, str, bool], list[int]] = {}
    for case in journal.cases:
        count = counts.setdefault((case.what, case.outcome, case.bad), [0, 0])
        count[0] += 1
        count[1] += case.amount
    common = {
        "seconds": round(journal.seconds),
        "command": f"python benchmarks/soak.py {name}",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": processor(),
        "versions": versions(),
    }
    rows = [
        {"campaign": name, "what": what, "outcome": outcome, "bad": bad, "cases": cases, "amount": amount}
        | {"unit": campaign.unit, **common}
        for (what, outcome, bad), (cases, amount) in sorted(counts.items())
    ]
    rows = [row for row in _read_csv("soak") if row["campaign"] != name] + rows
    bad = [row for row in _read_csv("soak.bad") if row["campaign"] != name]
    bad += [
        {
            "campaign": name,
            "seed": case.seed,
            "what": case.what,
            "outcome": case.outcome,
            "detail": case.detail,
        }
        for case in journal.cases
        if case.bad
    ]
    _write_csv("soak", list(rows[0]), rows)
    _write_csv("soak.bad", ["campaign", "seed", "what", "outcome", "detail"], bad)
    write_text(RESULTS / "soak.md", "\n".join(_page(_read_csv("soak"), _read_csv("soak.bad"))) + "\n")
    print("written: benchmarks/results/soak.md, soak.csv, soak.bad.csv")


def _page(rows: list[dict[str, str]], bad: list[dict[str, str]]) -> Iterator[str]:
    """Yield the lines of soak.md: the outcomes of each campaign, and bad cases."""
    yield "# Campaigns"
    yield ""
    yield "Written by `make soak`. Every case follows from its seed; `soak.bad.csv` has every bad one."
    for name in CAMPAIGNS:
        mine = [row for row in rows if row["campaign"] == name]
        if not mine:
            continue
        yield from ("", f"## {name.capitalize()}", "")
        first = mine[0]
        total = sum(int(row["amount"]) for row in mine)
        yield f"`{first['command']}`: {total} {first['unit']} in {int(first['seconds']) // 60} minutes, {first['date']}, "
        yield f"commit {first['commit']}, {first['machine']}, {first['versions']}."
        yield from ("", f"| outcome | cases | {first['unit']} |", "|---|---:|---:|")
        outcomes = sorted({(row["bad"] == "True", row["outcome"]) for row in mine})
        for is_bad, outcome in outcomes:
            same = [row for row in mine if row["outcome"] == outcome]
            sums = [sum(int(row[key]) for row in same) for key in ("cases", "amount")]
            yield f"| {f'**{outcome}**' if is_bad else outcome} | {sums[0]} | {sums[1]} |"
        worst = [row for row in bad if row["campaign"] == name]
        if worst:
            yield ""
        for row in worst[:SHOWN]:
            detail = row["detail"].replace("\n", " ").replace("|", "\\|")[:200]
            yield f"- `--seed {row['seed']}`, {row['what']}: {row['outcome']}: {detail}"


def _read_csv(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write_csv(name: str, fields: list[str], rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(RESULTS / f"{name}.csv", text.getvalue())


def _program_hash() -> str:
    """Return a hash of the package and of the campaigns."""
    digest = hashlib.sha256()
    files = [path for folder in ("dbf_compile", "passes", "kernels") for path in (ROOT / folder).rglob("*")]
    files += [*Path(__file__).parent.glob("soak*.py"), *(ROOT / "tests" / "support" / "native").iterdir()]
    for path in sorted(path for path in files if path.suffix in (".py", ".cpp", ".h")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()
