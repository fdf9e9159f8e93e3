"""What guidance in an interval of the steps costs in quality and gains in speed, on the bundled model."""

import time

import jax

from eval.stages import STAGES, Measured, Stage
from megjax.configs import require
from megjax.diffusion.layout import locate
from megjax.diffusion.pipeline import StableDiffusion
from megjax.ldm import quality
from megjax.metrics import SceneNet

INTERVALS = ((0.0, 1.0), (0.2, 1.0), (0.0, 0.8), (0.2, 0.8), (0.4, 0.8), (0.0, 0.0))
BATCH, STEPS, SCALE = 50, 25, 3.0
COLUMNS = [
    "guided steps",
    "images/s",
    "speed-up",
    "caption accuracy (%)",
    "all attributes right (%)",
    "Frechet distance",
]


def run(num: int, rounds: int, intervals=INTERVALS, steps: int = STEPS) -> Measured:
    """Rows of the benchmark file, no missing peers, and notes. `num` held-out captions an interval, 50 at a time."""
    folder = locate("scenes")
    pipe, scenenet = StableDiffusion.from_pretrained(folder), SceneNet.load(folder / "scenenet")
    ids = pipe.tokenize(["a house under a clear sky"] * BATCH)
    calls = {}
    for interval in intervals:
        options = {"num_steps": steps, "guidance_scale": SCALE, "guidance_interval": interval}
        calls[interval] = lambda i, options=options: pipe.generate(jax.random.key(i), ids, **options)
        jax.block_until_ready(calls[interval](0))
    seconds = {interval: [] for interval in intervals}
    for i in range(rounds):
        for interval, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call(i))
            seconds[interval].append(time.perf_counter() - started)
    rows = []
    for interval in intervals:
        options = {"num_steps": steps, "guidance_scale": SCALE, "guidance_interval": interval}
        found = quality.measure(pipe, scenenet, num, batch=BATCH, **options)
        ordered = sorted(seconds[interval])
        rows.append(
            {
                "case": f"guidance {SCALE:g} in an interval of {steps} steps, bundled model, {num} captions",
                "batch": BATCH,
                "implementation": f"{interval[0]:.0%} to {interval[1]:.0%}" if interval[1] else "none",
                "interval": list(interval),
                "images_per_second": BATCH / ordered[len(ordered) // 2],
                "accuracy": found["generated_accuracy"],
                "exact": found["generated_exact"],
                "frechet_distance": found["scenenet_frechet_distance"]["mean"],
                "rounds": rounds,
            }
        )
    for row in rows:
        row["speed_up"] = row["images_per_second"] / rows[0]["images_per_second"]
    return rows, [], ["Brackets are 95 % bootstrap intervals over captions; distances in SceneNet features."]


def cells(row) -> list[str]:
    """One line of the table."""

    def percent(found):
        return f"{100 * found['mean']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"

    return [
        row.implementation,
        f"{row.images_per_second:.1f}",
        f"{row.speed_up:.2f}",
        percent(row.accuracy),
        percent(row.exact),
        f"{row.frechet_distance:.1f}",
    ]


def check(args) -> None:
    """ValueError for a number of captions that is not of whole batches."""
    require(args.captions % BATCH == 0, "--captions", args.captions, f"a multiple of {BATCH}")


STAGES.register(
    Stage(
        name="guidance",
        title="guidance in an interval of the steps",
        version=1,
        rank=80,
        run=lambda args, _: run(args.captions, args.rounds),
        columns=COLUMNS,
        cells=cells,
        check=check,
    )
)
