"""The training run, from top to bottom: data, model, state, resume, steps, result."""

import contextlib
import ctypes
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune import attention_kernel, fate, loss_scale, out_of_memory, processes, restack, tune
from jaxtune.assemble import Assembled, Source, assemble
from jaxtune.checkpoint import Checkpointer, by_path, read_meta
from jaxtune.config import Config, PrecisionSection
from jaxtune.console import console, go_on_unheard, loading_bar, say, stage, warn
from jaxtune.data.loader import Batch, Data, Dataset, build_data
from jaxtune.data.report import check_positions
from jaxtune.errors import TrainingStopped
from jaxtune.export import check_result, write_result
from jaxtune.kept import compiled_anew
from jaxtune.mesh import check_batch, check_time, make_mesh
from jaxtune.metrics import Recorder, Silent, read_rows
from jaxtune.models.execution import Execution, worth_unrolling
from jaxtune.models.weights import Tree
from jaxtune.number_types import compute_dtype, narrower, wider
from jaxtune.optim import make_schedule
from jaxtune.parallel.checks import check_fit, check_offload
from jaxtune.parallel.layout import check_sharded
from jaxtune.parallel.local import check_sums
from jaxtune.parallel.schedule import bubble
from jaxtune.parallel.stages import STACKS
from jaxtune.program import Program, build
from jaxtune.rundir import Run, open_run
from jaxtune.section import adapter_of
from jaxtune.signals import StopSignal
from jaxtune.state import owned
from jaxtune.tune.peft_config import warn_of_another_base


@dataclass
class Job:
    """A run with everything in place for its next step."""

    config: Config
    data: Data
    assembled: Assembled
    program: Program
    state: Tree
    train_step: Callable[[Tree, Tree, dict, jax.Array], tuple[Tree, dict[str, jax.Array]]]
    needs: str  # of a step, of each device's memory
    eval_step: Callable[[Tree, Tree, dict], tuple[jax.Array, jax.Array]] | None = None


@fate.together()
def train(config: Config) -> list[dict]:
    """Run, or go on with, the run that `config` describes; the rows of its metrics.jsonl.

    Every process of several calls this. An error in one of them ends all.

    Raises:
        UserError: something of the user's is wrong, by name.
        SystemExit: 143 after SIGTERM, when the step is finished and saved.
    """
    go_on_unheard()
    config = config.model_copy(update={"tune": tune.resolve(config.tune)})
    processes.compare(lambda: processes.program(config))
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.train.batch_size, config.train.micro_batches)
    # Several processes stop at a step that they agree on.
    with open_run(config) as run, StopSignal(steps=processes.count() > 1) as stop:
        if run.finished:
            return read_rows(run.directory)
        stage(f"Reading {config.model.path}")
        source = Source.open(config.model, config.data.template, config.tune, noted=run.tokenizer_print)
        config = config.model_copy(update={"tune": source.tuning})
        check_fit(config, mesh, source.config, source.quantized)
        check_offload(config, mesh)
        check_result(run.directory, config.tune, source)
        for note in tune.check(config.tune, source.config, source.scheme):
            warn(note)
        if (adapter := adapter_of(config.tune)) is not None:
            warn_of_another_base(adapter, config.model.path)
        _look(stop)
        stage("Reading the data")
        virtual = tune.virtual_ids(config.tune, source.config)
        vocab_size = tune.vocab_size(config.tune, source.config)
        data = build_data(config.data, config.eval, config.train, source.tokenizer, virtual, vocab_size)
        data.report(console)
        check_positions(data.train, source.config)
        _look(stop)
        for part in filter(None, (data.train, data.eval)):
            check_time(mesh, config.mesh, part.shape[-1])
        held_out = None if data.eval is None else data.eval.fingerprint
        run.check(data.train.fingerprint, source.path, data.train.steps, held_out, source.tokenizer)
        with out_of_memory.explained(config, "before the first step"):
            job = prepare(config, source, data, mesh)
        with Checkpointer(run.checkpoints, config.checkpoint.every, config.checkpoint.keep) as checkpoints:
            _look(stop)
            done = resume(job, run, checkpoints)
            if not done and (hint := narrower(config, mesh.devices.flat[0], source.scheme is not None)):
                say(hint)
            run.begin(done)
            tell_of_a_gap(run, config, data.train, done)
            stop.steps = True
            with open_record(job, run, done) as recorder, out_of_memory.explained(config, "in training", job.needs):
                go_on(job, run, checkpoints, recorder, stop, done)
        finish(job, run)
    return recorder.rows


def tell_of_a_gap(run: Run, config: Config, data: Dataset, done: int) -> None:
    """A run that ended with its epochs took what rows were left as its last step, whose batch is not trained again."""
    steps, epochs = (run.before(f"train.{name}", getattr(config.train, name)) for name in ("steps", "epochs"))
    rows = 0 if steps is not None else data.rows_of(epochs)
    if rows % data.batch_size and rows // data.batch_size + 1 == done < data.steps:
        left = data.batch_size - rows % data.batch_size
        warn(
            f"train.epochs: the run ended at step {done}, of {rows % data.batch_size} rows; the next "
            f"{left}, which would have filled it, are left out"
        )


def _look(stop: StopSignal) -> None:
    """Before the first step: exit, if that was asked for."""
    if stop.requested and not stop.steps:
        say("Stopped before the first step of this start; the same command goes on as this one would have")
        raise SystemExit(stop.exit_code)


def prepare(config: Config, source: Source, data: Data, mesh: Mesh) -> Job:
    """Load the model, put the tuning method and the optimiser on it, and compile the step."""
    kernel = attention_kernel.settle(config, source.config, mesh, data.one_each)
    with loading_bar(f"Loading {source.path}") as progress:
        assembled = assemble(
            source,
            config.tune,
            mesh,
            init=config.model.init,
            dtype=config.precision.params,
            seed=config.train.seed,
            execution=Execution.of(
                config,
                compute_dtype(config.precision.compute),
                kernel,
                one_document=data.one_each,
                unroll=worth_unrolling(config, mesh, source.config, data.train.steps * math.prod(data.train.shape)),
            ),
            progress=progress,
        )
    trained, total = tune.counts(config.tune, assembled.model.weights, assembled.params, assembled.mask)
    program = build(config, assembled.model, mesh, assembled.params, assembled.mask, data.train.steps)
    say(f"Training {trained:,} of {total:,} parameters ({trained / total:.3%}) on {_devices(mesh)}")
    if data.train.steps == 1 and make_schedule(config.optim, 1)(1) == 0:
        warn(
            "optim.warmup: the only step has a learning rate of 0 and changes nothing; set it to 0, or take more steps"
        )
    if program.pipeline is not None:
        say(f"The pipeline's schedule leaves a stage waiting for {bubble(program.pipeline.schedule):.0%} of a step")
    for note in wider(config.precision, mesh.devices.flat[0]):
        warn(note)
    check_sharded(program.state["trainable"], program.homes["trainable"])
    program.state["trainable"] = owned(program.state["trainable"])
    first = program.put(data.train.batch(1, rows=()).arrays())  # any will do
    with compiled_anew(mesh):
        compiled, needs = _compile(program.train_step, program.state, program.frozen, first, _number(1))
        ask = None if data.eval is None else _compile_eval(program, data.eval)
    return Job(config, data, assembled, program, program.state, compiled, needs, ask)


def resume(job: Job, run: Run, checkpoints: Checkpointer) -> int:
    """Take the state of the last valid checkpoint, if there is one; the step that it is of, else 0."""
    processes.barrier("compiled")  # collectives wait for one another for a short time only
    step = checkpoints.latest_valid()
    if step is None:
        checkpoints.preflight(job.state)
        return 0
    model, source = job.assembled.model, job.assembled.source
    wanted, saved = job.program.saved_shape(), checkpoints.arrays(step)
    way = restack.move(wanted, saved, job.config.tune, source.config, model.stacks)
    kept = {path: array for path, array in by_path(job.state).items() if path in way.gaps}
    first = job.program.saved({STACKS: kept})[STACKS]
    for array in jax.tree.leaves(job.state):  # there may be no room for two
        array.delete()
    job.state = job.program.loaded(way.joined(checkpoints.restore(step, way.needed), first))
    precision = job.config.precision
    if _scale_begins_again(read_meta(run.checkpoints, step)["config"]["precision"], precision):
        anew = partial(loss_scale.begun_again, initial=precision.loss_scale.initial)
        job.state["guard"] = jax.jit(anew, out_shardings=job.program.homes["guard"])(job.state["guard"])
    say(f"Going on from the checkpoint of step {step} in {run.directory}")
    return step


def _scale_begins_again(before: dict[str, Any], now: PrecisionSection) -> bool:
    """Whether a checkpoint's loss had no scale, or one that began elsewhere. before: its settings of precision."""
    began = before["compute"], before["loss_scale"]["initial"]
    return now.compute == "float16" and began != (now.compute, now.loss_scale.initial)


def open_record(job: Job, run: Run, done: int) -> Recorder | Silent:
    """The run's record, which the first process alone writes."""
    if not processes.is_first():
        return Silent(run.directory)
    return Recorder(run.directory, job.config.log, job.data.train.steps, done)


def go_on(
    job: Job, run: Run, checkpoints: Checkpointer, recorder: Recorder | Silent, stop: StopSignal, done: int
) -> None:
    """The steps after `done`, with their records, evaluations and checkpoints."""
    total, every = job.data.train.steps, job.config.eval.every
    told = processes.SharedStop(stop)
    ends_here = done == total and job.data.eval is not None
    if ends_here and not processes.decided_by_first("evaluated", lambda: has_evaluation(recorder.rows, done)):
        recorder.evaluation(done, evaluate(job))
    waiting: Outcome | None = None  # the step before, not yet asked for: the device is kept busy meanwhile
    for step, (batch, placed, seconds) in enumerate(placed_batches(job, done + 1), done + 1):
        told.ask()
        job.state, metrics = job.train_step(job.state, job.program.frozen, placed, _number(step))
        checkpoints.check_errors()
        with fate.waited_for(step):
            if waiting:
                record(waiting, recorder, job.config)
            waiting = Outcome(step, batch, seconds, metrics)
            stopping = told.answer()
        evaluates = job.data.eval is not None and (step == total or (every and step % every == 0))
        saves = step == total or checkpoints.due(step) or stopping
        if evaluates or saves:
            record(waiting, recorder, job.config)
            waiting = None
        if evaluates:
            recorder.evaluation(step, evaluate(job))
        if saves:
            checkpoints.save(step, job.program.saved(job.state), run.meta, wait=bool(stopping) or step == total)
        if stopping and step < total:
            say(f"Stopped after step {step}, which is saved; the same command goes on from there")
            raise SystemExit(128 + stopping)


def has_evaluation(rows: list[dict], step: int) -> bool:
    return any(row["step"] == step and "eval_loss" in row for row in rows)


def placed_batches(job: Job, first_step: int) -> Iterator[tuple[Batch, dict[str, jax.Array], float]]:
    """Each batch, its arrays on the devices, and the seconds that the loop waited for both: the batch is made ahead
    by a thread, while the device computes."""
    batches = job.data.train.batches(first_step, processes.own_rows(job.program.rows, job.data.train.shape))
    began = time.perf_counter()
    for batch in batches:
        placed = job.program.put(batch.arrays())
        yield batch, placed, time.perf_counter() - began
        began = time.perf_counter()


@dataclass
class Outcome:
    """A step whose numbers are still on the device."""

    step: int
    batch: Batch
    data_wait: float  # seconds
    metrics: dict[str, jax.Array]


def record(outcome: Outcome, recorder: Recorder | Silent, config: Config) -> None:
    """Write a step down, and end a run that has come to nothing.

    Raises:
        TrainingStopped: the loss or the gradient was not finite, or a spike, too many times in a row.
    """
    numbers = {name: value.item() for name, value in jax.device_get(outcome.metrics).items()}
    bad, spike = numbers["bad_in_a_row"], numbers["spike"]
    batch = outcome.batch
    if processes.is_first():  # the others have not all of the batch
        recorder.step(
            outcome.step,
            loss=numbers["loss"],
            grad_norm=numbers["grad_norm"],
            lr=numbers["lr"],
            bad_steps=numbers["skipped"],
            loss_scale=numbers["loss_scale"] if config.precision.compute == "float16" else None,
            tokens=batch.num_tokens,
            supervised_tokens=batch.num_supervised,
            data_wait=outcome.data_wait,
            batch_sha256=batch.sha256(),
            source_examples=batch.sources,
        )
    if bad:
        why = f", more than {config.train.skip_spikes} sigmas above the last ones" if spike else ""
        warn(f"step {outcome.step}: loss {numbers['loss']}{why}, gradient norm {numbers['grad_norm']}: not applied")
    if bad >= config.train.max_bad_steps:
        raise TrainingStopped(_stopped(outcome.step, bad, spike, config))


def _stopped(step: int, bad: int, spike: bool, config: Config) -> str:
    had = "a loss that is a spike" if spike else "a loss or gradient that is not finite"
    hint = "Set precision.compute to bfloat16 or float32, l" if config.precision.compute == "float16" else "L"
    more = f"raise train.skip_spikes ({config.train.skip_spikes}), " if spike else ""
    return (
        f"{bad} steps in a row had {had}; the weights are those after step {step - bad}. {hint}ower optim.lr "
        f"({config.optim.lr}), set optim.clip_norm, {more}or look at the data; train.max_bad_steps "
        f"({config.train.max_bad_steps}) says how many are borne"
    )


def evaluate(job: Job) -> float:
    """The mean loss over the supervised tokens of the held-out data."""
    assert job.data.eval is not None and job.eval_step is not None
    trainable, frozen, ask = job.state["trainable"], job.program.frozen, job.eval_step
    batches = job.data.eval.batches(rows=processes.own_rows(job.program.rows, job.data.eval.shape))
    sums = [ask(trainable, frozen, job.program.put(batch.arrays())) for batch in batches]
    losses, tokens = zip(*jax.device_get(sums), strict=True)
    return float(sum(losses) / sum(tokens))


def finish(job: Job, run: Run) -> None:
    """Write what training ends with."""
    config = job.config
    steps, skipped = job.data.train.steps, int(job.state["guard"]["skipped"])
    if skipped == steps:
        warn(
            f"none of the {steps} steps was applied ({skipped} skipped): the result is what the run began with; the "
            "warnings of the steps say why"
        )
    params = job.program.params(job.state)
    directory = write_result(run.directory, config.tune, job.assembled, params, config.precision.params, config.model)
    run.finish()
    say(f"Wrote {directory}")


def _compile(jitted: Any, *arguments: Any) -> tuple[Any, str]:
    """The compiled step, and what it needs of each device."""
    stage("Compiling the step")
    started = time.monotonic()
    compiled = jitted.lower(*arguments).compile()
    check_sums(compiled)
    memory = compiled.memory_analysis()
    held, temporary = memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9
    needs = f"a step needs {held:.2f} + {temporary:.2f} GB on each device"
    _give_back()
    say(f"Compiled in {time.monotonic() - started:.1f} s; {needs}")
    return compiled, needs


def _compile_eval(program: Program, data: Dataset) -> Any:
    """The compiled evaluation: what cannot be compiled is known before the first step."""
    held_out = program.put(data.batch(1, rows=()).arrays())
    compiled = program.eval_step.lower(program.state["trainable"], program.frozen, held_out).compile()
    check_sums(compiled)
    return compiled


def _give_back() -> None:
    """To the system, the host's memory that loading and compiling have freed: XLA leaves some 200 MB. glibc only."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _number(step: int) -> jax.Array:
    return jnp.int32(step)


def _devices(mesh: Mesh) -> str:
    """`8 x cpu (data 2, fsdp 4)`."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}" + (f" ({sizes})" if sizes else "")
