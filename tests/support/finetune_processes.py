"""A program of several processes that finetune a folder together; the first one prints what came out as JSON."""

import json
import os
import sys
from pathlib import Path

import torch
from support.models.compressed import SHORT

import dbf_compile

if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    result = dbf_compile.finetune(
        place / "compressed",
        {"words": place / "dense.txt"},
        place / "together",
        dense=place / "dense",
        **{**SHORT, "batch": 2},
    )
    if os.environ["RANK"] == "0":
        print(json.dumps([result.before["kl"], result.after["kl"], result.course.flips]))
