"""jaxtune, as its users run it: the training loop on a configuration. It ends after the last step: nothing is exported.

usage: ours.py SPEC.json [--share-prefix]
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the names of the scripts here would hide packages

from jaxtune.huge_pages import start_anew  # noqa: E402
from tools.bench_peers.common import Compiled, Meter, Spec, jax_peak_gb  # noqa: E402


def main() -> None:
    import json
    import shutil
    import time

    spec = Spec.read(sys.argv[1])
    meter = Meter(spec.warm)
    compiled = Compiled()

    from jaxtune import loop
    from jaxtune.config import load_config
    from jaxtune.tokenizer import without_torch

    without_torch()  # as the command line does

    record, assemble = loop.record, loop.assemble
    own = ("data.share_prefix=true",) if "--share-prefix" in sys.argv else ()
    total, peak = spec.warm + spec.steps, []

    def noted(outcome, recorder, config):
        """A step's numbers are on the host, so it is done."""
        record(outcome, recorder, config)
        meter.ends.append(time.time())
        batch = outcome.batch
        meter.counts.append((batch.num_tokens + batch.spared, batch.num_supervised))
        meter.losses.append(float(recorder.rows[-1]["loss"]))
        if len(meter.ends) == total:
            peak.append(jax_peak_gb(spec.device))
            raise Done

    def loaded(*arguments, **options):
        found = assemble(*arguments, **options)
        meter.loaded = time.time()
        return found

    shutil.rmtree(json.loads(Path(spec.jaxtune).read_text())["train"]["output_dir"], ignore_errors=True)
    loop.record, loop.assemble = noted, loaded
    try:
        loop.train(load_config(spec.jaxtune, [f"train.steps={total}", *own, *spec.overrides]))
    except Done:
        print("\n" + meter.answer(peak[0], compiled.seconds))


class Done(BaseException):
    """All steps are timed."""


if __name__ == "__main__":
    start_anew()  # likewise
    main()
