"""Injects faults into runs on this machine and says what was lost: python tests/faults/run.py [ROW ...] [--tries N] [--seed S]."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
os.environ.setdefault("TRITON_INTERPRET", "1")  # as in tests/conftest.py
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROWS = {  # and how often each is tried
    "kills": 200,
    "damage": 200,
    "pickles": 40,
    "full_disk": 200,
    "power_cuts": 300,
    "workers": 20,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--tries", type=int, help="of each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the runs; kept if something was lost")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    from faults.tally import Tally

    tally = Tally()
    for name in arguments.rows:
        if name not in ROWS:
            parser.error(f"ROW must be one of {', '.join(ROWS)}, got {name}")
        tally.begin(name, arguments.tries or ROWS[name])
        import numpy as np

        rng = np.random.default_rng([arguments.seed, list(ROWS).index(name)])
        for outcome in importlib.import_module(f"faults.{name}").tries(rng, folder, tally.planned):
            tally.add(outcome)
    tally.print_table()
    if tally.lost:
        print(f"The files are in {folder}.")
    elif arguments.folder is None:
        shutil.rmtree(folder)
    return 1 if tally.lost else 0


if __name__ == "__main__":
    sys.exit(main())
