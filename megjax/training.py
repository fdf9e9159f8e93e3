"""The one fit loop: chunks of compiled steps, Orbax checkpoints, bit-exact resume, metrics and progress."""

import dataclasses
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, PyTree
from tqdm import tqdm

from megjax.configs import read_json, require, write_json
from megjax.files import write_text
from megjax.keys import from_seed
from megjax.precision import promoting
from megjax.processes import gather
from megjax.pytrees import pytree_dataclass
from megjax.runs import MetricsLog, check_same_run, describe_parameters, newest, read_waiting, write_waiting
from megjax.sharding import mesh_of
from megjax.termination import TerminationNotice

WHOLE = PartitionSpec()
LossFn = Callable[[PyTree, PyTree, Key[Array, ""]], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Optimisation and bookkeeping of one fit.

    The learning rate rises linearly over `warmup_steps` and falls to zero by a cosine at `num_steps`. `ema_decay` is
    the decay of the parameter average, smaller at first: min(ema_decay, (1 + step) / (10 + step)).
    A dispatch runs `steps_per_dispatch` steps, but never past a log line; 0 means 1 on CPU and 100 elsewhere, since
    XLA:CPU runs the gradient of a convolution inside a loop many times slower. The first step, at the foot of the
    warm-up, has learning rate 0.
    """

    num_steps: int = 10_000
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    log_every: int = 50
    checkpoint_minutes: float = 10.0
    steps_per_dispatch: int = 0

    def __post_init__(self):
        require(self.num_steps >= 1, "num_steps", self.num_steps, "at least 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")
        require(0 <= self.warmup_steps < self.num_steps, "warmup_steps", self.warmup_steps, "in [0, num_steps)")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "positive")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        require(self.log_every >= 1, "log_every", self.log_every, "at least 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        require(self.checkpoint_minutes >= 0, "checkpoint_minutes", self.checkpoint_minutes, "at least 0")
        require(self.steps_per_dispatch >= 0, "steps_per_dispatch", self.steps_per_dispatch, "at least 0")

    @property
    def optimizer(self) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, max(self.warmup_steps, 1), max(self.num_steps, 2)
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm), optax.adamw(schedule, weight_decay=self.weight_decay)
        )


@pytree_dataclass
class FitState:
    """What a checkpoint holds; `ema` is the average of `params` that is meant for use."""

    step: Any
    params: Any
    ema: Any
    opt_state: Any


def init_state(config: FitConfig, params: PyTree) -> FitState:
    """The state before the first step, in buffers of its own, since `make_chunk` donates them."""
    params, ema = (jax.tree.map(jnp.copy, params) for _ in range(2))
    return FitState(jnp.zeros((), jnp.int32), params, ema, config.optimizer.init(params))


def shards_mesh(num_shards: int) -> Mesh:
    """A mesh of as many devices as divide `num_shards`, with the one axis "data".

    Of many processes all take part, with equally many devices each: one where there is only one shard, which then all
    compute alike. Otherwise ValueError unless their number divides `num_shards`.
    """
    count = jax.process_count()
    whole = num_shards == 1 or num_shards % count == 0
    require(whole, "num_shards", num_shards, f"1 or a multiple of the number of processes, {count}")
    shares = max(num_shards // count, 1)
    size = max(n for n in range(1, jax.local_device_count() + 1) if shares % n == 0)
    of_process = [[d for d in jax.devices() if d.process_index == index] for index in range(count)]
    return mesh_of([device for devices in of_process for device in devices[:size]])


def shared(tree: PyTree, num_shards: int = 1) -> PyTree:
    """Arrays that all processes hold alike, on the devices of `shards_mesh`; as they are on the one device of one."""
    if num_shards == 1 and jax.process_count() == 1:
        return tree
    sharding = NamedSharding(shards_mesh(num_shards), WHOLE)

    def place(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # JAX 0.10 puts numbers on other processes' devices, not keys
            return jax.random.wrap_key_data(place(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        return jax.device_put(x, sharding)

    return jax.tree.map(place, tree)


def own(tree: PyTree) -> PyTree:
    """This process's copy of what `shared` has placed, for use with arrays of its own."""
    return tree if jax.process_count() == 1 else jax.tree.map(lambda x: x.addressable_data(0), tree)


def data_parallel(
    loss_fn: LossFn,
    num_shards: int,
    mesh: Mesh | None = None,
    *,
    param_specs: PyTree = WHOLE,
    data_specs: PyTree = WHOLE,
) -> LossFn:
    """The mean of `num_shards` draws of `loss_fn`, draw i with `fold_in(key, i)`, spread over the devices there are.

    What is drawn does not depend on the number of devices, so that losses agree but for rounding. Each draw is one
    share of the batch. `mesh` defaults to `shards_mesh(num_shards)`; its axes all split the batch. Parameters that
    `param_specs` (a tree of PartitionSpecs like theirs) split are gathered for use; their gradients come back split.
    Data that `data_specs` split stay so: each draw sees the part of its device.

    Raises ValueError if the devices of `mesh` do not divide `num_shards`.
    """
    if num_shards == 1 and mesh is None:
        return loss_fn
    mesh = shards_mesh(num_shards) if mesh is None else mesh
    require(num_shards % mesh.size == 0, "num_shards", num_shards, f"a multiple of the mesh's {mesh.size} devices")
    specs = (param_specs, data_specs, PartitionSpec(mesh.axis_names))

    def share(params: PyTree, data: PyTree, keys: Key[Array, " n"]):
        params = jax.tree.map(_gather, param_specs, params, is_leaf=lambda x: isinstance(x, PartitionSpec))
        draws = [loss_fn(params, data, keys[i]) for i in range(num_shards // mesh.size)]
        mean = jax.tree.map(lambda *parts: sum(parts) / len(parts), *draws)
        return jax.lax.pmean(mean, mesh.axis_names)

    # Unchecked, because kernels such as a TPU's attention do not say over which axes their results vary.
    shares = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=WHOLE, check_vma=False)

    def mean_loss(params: PyTree, data: PyTree, key: Key[Array, ""]):
        return shares(params, data, jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_shards)))

    return mean_loss


def _gather(spec: PartitionSpec, params: PyTree) -> PyTree:
    """The whole of what `spec` splits, inside `shard_map`."""
    for axis, name in enumerate(spec):
        if name is not None:
            params = jax.tree.map(lambda x, a=axis, n=name: jax.lax.all_gather(x, n, axis=a, tiled=True), params)
    return params


def make_step(config: FitConfig, loss_fn: LossFn) -> Callable[[FitState, PyTree, Key[Array, ""]], tuple]:
    """One optimiser step, `(state, data, key) -> (state, metrics)`; the draws depend on `key` and `state.step` only."""

    def step(state: FitState, data: PyTree, key: Key[Array, ""]):
        step_key = jax.random.fold_in(key, state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, data, step_key)
        # Adam raises a float to an integer power.
        updates, opt_state = promoting(config.optimizer.update)(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.ema_decay, (1.0 + count) / (10.0 + count))
        ema = optax.incremental_update(params, state.ema, 1.0 - decay)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
        return FitState(state.step + 1, params, ema, opt_state), metrics

    return step


def make_chunk(config: FitConfig, loss_fn: LossFn) -> Callable[..., tuple]:
    """Jitted `(state, data, key, num_steps) -> (state, mean metrics)`: `num_steps` (static) steps in one dispatch."""
    step = make_step(config, loss_fn)

    def chunk(state: FitState, data: PyTree, key: Key[Array, ""], num_steps: int):
        if num_steps == 1:
            return step(state, data, key)
        state, metrics = jax.lax.scan(lambda s, _: step(s, data, key), state, None, length=num_steps)
        return state, jax.tree.map(lambda x: x.mean(0), metrics)

    return jax.jit(chunk, static_argnums=3, donate_argnums=0)


def fit(
    loss_fn: LossFn,
    params: PyTree,
    data: PyTree,
    config: FitConfig,
    folder: Path,
    *,
    num_shards: int = 1,
    description: dict[str, Any] | None = None,
    on_checkpoint: Callable[[FitState], None] | None = None,
) -> FitState:
    """Minimise `loss_fn(params, data, key) -> (loss, metrics)` and return the final state, of many processes in each.

    Continues from the newest checkpoint in `folder`, to the bit as if it had never stopped; `params` are the start of a
    new run. A step averages `num_shards` draws of the loss, over the devices (see `data_parallel`); a run resumed on
    another number of devices goes on with the same draws. `description` is what besides `config` must agree for a
    resume. `on_checkpoint` is called after each save. `seconds.json` has the time of all steps, compilation included.

    Raises ValueError if `folder` holds a run with other settings, or the number of processes does not divide a
    `num_shards` above 1.
    """
    state, data = shared((init_state(config, params), data), num_shards)
    chunk, key = make_chunk(config, data_parallel(loss_fn, num_shards)), from_seed(config.seed)
    final = run_loop(
        lambda state, num_steps: chunk(state, data, key, num_steps),
        state,
        folder,
        num_steps=config.num_steps,
        per_dispatch=config.steps_per_dispatch or (1 if jax.default_backend() == "cpu" else 100),
        log_every=config.log_every,
        checkpoint_minutes=config.checkpoint_minutes,
        parameters=params,
        description={**(description or {}), "fit": dataclasses.asdict(config)},
        on_checkpoint=on_checkpoint,
    )
    return own(final)


def run_loop(
    chunk: Callable[[Any, int], tuple[Any, dict[str, Array]]],
    state: Any,
    folder: Path,
    *,
    num_steps: int,
    per_dispatch: int,
    log_every: int,
    checkpoint_minutes: float,
    parameters: PyTree,
    description: dict[str, Any],
    on_checkpoint: Callable[[Any], None] | None = None,
) -> Any:
    """Run `chunk(state, n) -> (state, mean metrics of n steps)` up to step `num_steps` and return the final state.

    `state` is a pytree with the integer array `step`, at the start of a new run; a run in `folder` goes on from its
    newest checkpoint that can be read. Chunks have at most `per_dispatch` steps and end where metrics are logged, every
    `log_every` steps, so that a resumed run has the same ones. `parameters` are listed in parameters.txt. On SIGTERM
    the chunk under way is finished and a checkpoint saved before the process ends. Of many processes the first writes
    what is no checkpoint, and all call `on_checkpoint`, with their `own` state, and wait for each other after it.

    Raises ValueError if `folder` holds a run of another `description`, or checkpoints none of which can be read.
    """
    folder = Path(folder).absolute()
    check_same_run(folder, description)
    if jax.process_index() == 0:
        write_text(folder / "parameters.txt", describe_parameters(parameters))
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager(folder / "checkpoints", options=options) as manager:
        state = newest(manager, state)
        if int(state.step) < num_steps:
            with TerminationNotice() as notice:
                times = (num_steps, per_dispatch, log_every, checkpoint_minutes)
                state = _run(chunk, state, *times, folder, manager, on_checkpoint, notice)
            if int(state.step) < num_steps:  # die of the signal, as whoever sent it expects
                if jax.process_count() > 1:  # all at once: those that lose the first process would abort
                    jax.distributed.shutdown()
                signal.raise_signal(signal.SIGTERM)
                sys.exit(128 + signal.SIGTERM)
    return state


def _run(chunk, state, num_steps, per_dispatch, log_every, checkpoint_minutes, folder, manager, on_checkpoint, notice):
    """The state at step `num_steps`, or where the termination notice came."""
    step, first = int(state.step), jax.process_index() == 0
    log, waiting = (MetricsLog(folder, step) if first else None), read_waiting(folder, step)
    clock = folder / "seconds.json"
    spent, started = (read_json(clock)["seconds"] if step and clock.is_file() else 0.0), time.monotonic()
    saved_at, stopped = started, False
    options = {"mininterval": 5, "dynamic_ncols": True, "disable": not first}
    with tqdm(total=num_steps, initial=step, desc=folder.name, **options) as bar:
        while step < num_steps and not stopped:
            # Chunks end on the same boundaries wherever a run was resumed, so that the logged means agree too.
            boundary = (step // per_dispatch + 1) * per_dispatch
            boundary = min(boundary, (step // log_every + 1) * log_every, num_steps)
            state, metrics = chunk(state, boundary - step)
            waiting.append((boundary - step, metrics))
            bar.update(boundary - step)
            step = boundary
            logged = step % log_every == 0 or step == num_steps
            if logged:
                values = _mean(waiting)
                waiting = []
                if first:
                    log.write(step, values)
                bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
            stopped = notice.given()
            # The first process's clock decides, as all must save together.
            due = time.monotonic() - saved_at > 60 * checkpoint_minutes
            overdue = logged and gather("due" if due else "")[0] == "due"
            if overdue or step == num_steps or stopped:
                if first:
                    write_waiting(folder, step, waiting)
                manager.save(step, args=ocp.args.StandardSave(state))
                manager.wait_until_finished()
                saved_at = time.monotonic()
                if first:
                    write_json(clock, {"step": step, "seconds": round(spent + saved_at - started, 1)})
                if on_checkpoint is not None and not stopped:  # which may take longer than the sender waits
                    on_checkpoint(own(state))
                gather()
    if first:
        log.close()
    return state


def _mean(waiting: list[tuple[int, dict]]) -> dict[str, float]:
    weights = [count for count, _ in waiting]
    values = jax.device_get([metrics for _, metrics in waiting])
    total = sum(weights)
    return {name: float(sum(w * v[name] for w, v in zip(weights, values, strict=True)) / total) for name in values[0]}
