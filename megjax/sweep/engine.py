"""The sweep: every point of a configuration measured once, kept as it finishes, resumed after any kill."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from megjax.channel import FADINGS
from megjax.configs import require, require_count
from megjax.metrics import METRICS
from megjax.power import POLICIES, find_policy, make_policy
from megjax.processes import check_others, gather, is_first, joint, num_processes, process_id, wait_for_file
from megjax.sweep.bench import Bench, make_bench
from megjax.sweep.config import Point, SweepConfig
from megjax.sweep.identity import part_identity, scheme_identity, sweep_fading, sweep_policy
from megjax.sweep.store import SETTINGS, Store, source_name, table_of
from megjax.sweep.summary import summarise
from megjax.units import linear_to_db


@joint()
def run_sweep(
    config: SweepConfig,
    folder: Path,
    *,
    latents: Path = Path("runs/latents"),
    training: Path | None = None,
    batch: int = 40,
    about: dict[str, str] | None = None,
    progress: bool = True,
    on_point: Callable[[Point], None] | None = None,
) -> pd.DataFrame:
    """Measure what `folder` lacks of the configuration's points and write `results.parquet`; returns that table.

    A point depends on the configuration, the models, the codec and its own key only, and is written in one step: a run
    that is killed at any moment goes on where it was, with identical results. Longer lists add points; a folder whose
    points share another setting or model is refused. Latents are generated once for each model and seed, in `latents`,
    those that schemes are fitted on in `training` (by default beside them), and spread over the local devices together
    with `batch` receptions at a time. The processes of a job, which must share all folders, take turns at the missing
    points; the first of them writes the table, and all return it. No number depends on how many devices or processes
    there are, but for rounding. `about` are notes (versions, commit) that go with every row; `on_point` is called after
    each measured point.

    Rows hold the point, `n` receptions and `images`, the mean and the 95 % interval (over images) of every metric, and
    in the points' own files the mean of every image. Raises ValueError, before anything is measured, for a bad
    configuration or folder; and, leaving all finished points, for a damaged file or a disk that takes no more. Then
    other processes raise ProcessFailed after the point that they are at.
    """
    require_count("batch", batch)
    for name in config.fadings:
        sweep_fading(name)
    for name in config.policies:
        sweep_policy(name)
    for metric in METRICS:
        METRICS.version_of(metric.name)
    benches, digests = {}, {}
    for model in config.models:
        for seed in config.seeds:
            benches[model, seed], digests[source_name(model, seed)] = make_bench(
                config, model, seed, latents, batch, training
            )
    store = Store(folder, {**config.shared(), "sources": digests})
    asked = config.points()
    measured: dict[Point, dict[str, Any] | None] = {point.physics(): None for point in asked}
    paths = {point: store.path(point, _parts(point, config.num_blocks)) for point in measured}
    missing = _open(store, measured, paths)
    for point in dict.fromkeys(dataclasses.replace(point, snr_db=0.0) for point in missing):
        benches[point.model, point.seed].check(point)
    for model, seed in dict.fromkeys((point.model, point.seed) for point in missing):
        _ = benches[model, seed].latents
    mine = missing[process_id() :: num_processes()]
    total, shown = sum(_work(config, point) for point in mine), progress and bool(mine) and is_first()
    with tqdm(total=total, desc=folder.name, unit="image", disable=None if shown else True) as bar:
        for point in mine:
            check_others()
            bar.set_postfix_str(f"{point.scheme} {point.snr_db:g} dB", refresh=False)
            row = _measure(benches[point.model, point.seed], point, config, bar)
            store.write(paths[point], {**row, **(about or {})})
            measured[point] = store.read(paths[point])
            if on_point is not None:
                on_point(point)
    gather()
    for point in (point for point, row in measured.items() if row is None):
        wait_for_file(paths[point])
        measured[point] = store.read(paths[point])
    frame = table_of([_row(point, measured[point.physics()], paths[point.physics()]) for point in asked])
    if is_first():
        store.merge(frame)
    gather()
    return frame


def _open(store: Store, measured: dict[Point, dict[str, Any] | None], paths: dict[Point, Path]) -> list[Point]:
    """Open the folder, read its points into `measured` and return the missing ones, as the first process sees them."""
    if is_first():
        store.open()
        measured |= {point: store.read(path) for point, path in paths.items()}
    points = list(measured)
    missing = json.loads(gather(json.dumps([i for i, point in enumerate(points) if measured[point] is None]))[0])
    if not is_first():
        wait_for_file(store.folder / SETTINGS)
        store.open()
    return [points[i] for i in missing]


def _measure(bench: Bench, point: Point, config: SweepConfig, bar: tqdm) -> dict[str, Any]:
    found = bench.measure(point, lambda count: bar.update(count * _weight(point)))
    products = jax.config.jax_default_matmul_precision or "default"
    made_by = {
        "device_kind": jax.local_devices()[0].device_kind,
        "precision": f"{np.dtype(bench.pipe.configs.unet.dtype).name}, {products} products",
    }
    return {**_described(point), **summarise(found, bench), **made_by}


def _described(point: Point) -> dict[str, Any]:
    """The point as columns; an infinite peak is none."""
    values = dataclasses.asdict(point)
    return values | {"peak_power": None if math.isinf(point.peak_power) else point.peak_power}


def _row(point: Point, measured: dict[str, Any], path: Path) -> dict[str, Any]:
    """The row of a point as it was asked for, with the name of the file of what was measured."""
    return {**measured, **_described(point), **_power(point, measured), "file": path.name}


def _power(point: Point, row: dict[str, Any]) -> dict[str, float]:
    """Mean power P of the symbols, and the effective SNR P / sigma^2 in dB."""
    if row["num_symbols"] == 0:
        return {"mean_power": 0.0, "effective_snr_db": -math.inf}
    mean = row["energy"] / row["num_symbols"]
    return {"mean_power": mean, "effective_snr_db": point.snr_db + float(linear_to_db(mean))}


def _parts(point: Point, num_blocks: int) -> dict[str, Any]:
    """What tells the parts that a point names from others of their names."""
    fading, policy = sweep_fading(point.fading), sweep_policy(point.policy)
    if isinstance(policy, str) and find_policy(policy)[0].trained:
        policy = make_policy(policy, fading, num_blocks)
    return {
        "scheme": scheme_identity(point.scheme, point.made()),
        "fading": part_identity(FADINGS, point.fading, fading),
        "policy": part_identity(POLICIES, point.policy, policy),
    }


def _weight(point: Point) -> int:
    """Work of one reception against that of decoding one image."""
    return 1 + point.device_steps


def _work(config: SweepConfig, point: Point) -> int:
    return config.num_images * config.realisations * _weight(point)


def read_points(folder: Path) -> list[dict[str, Any]]:
    """The points behind `results.parquet`, each once, with the mean of every image, for paired comparisons.

    Points of settings or versions that the last finished run did not ask for are left out. ValueError for a folder in
    which no run has finished, and for a point that is damaged or gone.
    """
    store = Store(folder, {})
    rows = {path: store.read(path) for path in store.asked()}
    gone = next((path for path, row in rows.items() if row is None), None)
    require(gone is None, "point", str(gone), "in its place; run the sweep again")
    return list(rows.values())
