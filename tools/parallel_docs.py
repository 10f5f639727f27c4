#!/usr/bin/env python3
"""Write what tests/test_parallel_table.py found into the table of docs/parallelism.md.

usage: python -m pytest -m "" tests/test_parallel_table.py && python tools/parallel_docs.py
"""

import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
PAGE, FOUND = REPOSITORY / "docs" / "parallelism.md", REPOSITORY / ".cache" / "parallel_table"
BEGIN, END = "<!-- table: written by tools/parallel_docs.py -->", "<!-- end of the table -->"


def main() -> int:
    from tests.parallel_rows import ROWS

    missing = [name for name in ROWS if not (FOUND / f"{name}.json").exists()]
    if missing:
        print(f"no result of {len(missing)} rows yet, {missing[0]} the first; run the tests", file=sys.stderr)
        return 1
    lines = ["| mesh and options | loss | parameters |", "|---|---|---|"]
    for name in ROWS:
        found = json.loads((FOUND / f"{name}.json").read_text(encoding="utf-8"))
        lines.append(f"| {name} | {found['loss']:.1e} | {found['weights']:.1e} |")
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")
    print(f"{PAGE}: {len(ROWS)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
