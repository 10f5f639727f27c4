"""python tools/export.py --run RUN --out DIR --format peft|hf [--dtype float32]
[--onto original|dequantized|quantized] [--base MODEL]: the same as `jaxtune export`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxtune.__main__ import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
