"""Injects faults into small runs and says what was lost: python tests/faults/run.py [ROW ...] [--tries N] [--seed S]."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
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
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=f"of {', '.join(ROWS)}; kills:5 is five of kills")
    parser.add_argument("--tries", type=int, help="of each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the runs; kept if something was lost")
    arguments = parser.parse_args()
    rows = {}
    for row in arguments.rows:
        name, _, tries = row.partition(":")
        if name not in ROWS:
            parser.error(f"ROW must be one of {', '.join(ROWS)}, got {name}")
        rows[name] = int(tries or arguments.tries or ROWS[name])
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    import numpy as np
    from faults.tally import Tally

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes of a try end too
    tally = Tally()
    try:
        for name, tries in rows.items():
            tally.begin(name, tries)
            rng = np.random.default_rng([arguments.seed, list(ROWS).index(name)])
            for outcome in importlib.import_module(f"faults.{name}").tries(rng, folder, tally.planned):
                tally.add(outcome)
    finally:
        tally.print_table()
    if tally.lost:
        print(f"The files are in {folder}.")
    elif arguments.folder is None:
        shutil.rmtree(folder)
    return 1 if tally.lost else 0


if __name__ == "__main__":
    sys.exit(main())
