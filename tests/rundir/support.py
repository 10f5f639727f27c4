"""What training leaves in a run directory, without training; and what is in one."""

from jaxtune.rundir import open_run


def take_steps(config, model, data="data", step=100, finish=False):
    """What training leaves behind."""
    with open_run(config) as run:
        run.check(data, model)
        run.begin(0)
        (run.directory / "ledger.jsonl").write_text('{"step": 1}\n')
        (run.checkpoints / str(step)).mkdir(parents=True, exist_ok=True)
        if finish:
            (run.directory / "adapter").mkdir()
            (run.directory / "adapter" / "adapter_config.json").write_text("{}")
            (run.directory / "adapter" / "adapter_model.safetensors").write_bytes(b"")
            run.finish()


def tree(directory):
    return {
        p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file() and p.name != "run.lock"
    }
