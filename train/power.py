"""Train a power policy by PPO for equal or a codec's block weights and a law of fading; resumes after a kill."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from flax import nnx

from megjax.channel import GaussMarkovFading, JakesFading, RayleighFading
from megjax.codec import SeedCodec, link
from megjax.configs import read_json, require
from megjax.data.latents import load as load_latents
from megjax.diffusion.pipeline import StableDiffusion
from megjax.power import LearnedPower
from megjax.power.environment import Quality
from megjax.power.recipe import PRESETS, PowerRecipe, train_power
from megjax.processes import is_first
from megjax.runtime import check_seed, command
from megjax.system import image_quality

RATES = (1.0, 2.0, 4.0, 8.0)
GRID_DB = tuple(np.arange(-15.0, 31.0, 5.0).tolist())


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to train and where to keep it."""

    preset: Literal["default", "tiny"] = "default"
    """Sizes and numbers of updates."""
    weights: str = "scenes"
    """"equal", or the codec whose block weights are trained for: "scenes" (bundled) or a folder."""
    fading: Literal["rayleigh", "gauss-markov", "jakes"] = "rayleigh"
    """Law of the gains."""
    rho: float = 0.9
    """Correlation of consecutive blocks (gauss-markov)."""
    doppler: float = 0.05
    """Largest Doppler shift in cycles per block (jakes)."""
    history: int = 0
    """Past gains that the policy sees."""
    reward: Literal["latent", "image"] = "latent"
    """The weighted latent error, or the PSNR of decoded images (bundled model, seeds of ratio 4, ordered)."""
    latents: Path = Path("runs/codec-scenes/generated")
    """Cache of latents that train.codec made, for --reward image."""
    start: str | None = None
    """A trained policy to go on from: "scenes" (bundled) or a folder."""
    learning_rate: float | None = None
    """Peak learning rate instead of the preset's."""
    blocks: int = 16
    """Fading blocks an image."""
    updates: int | None = None
    """Number of updates instead of the preset's."""
    envs: int | None = None
    """Environments instead of the preset's."""
    seed: int = 0
    """Seed of the training."""
    folder: Path | None = None
    """Run folder (default runs/power-WEIGHTS-FADING-SEED): checkpoints, metrics.jsonl, TensorBoard."""
    export: Path | None = None
    """Where the finished policy goes; default FOLDER/model."""


def codec_weights(codec: SeedCodec, num_blocks: int) -> np.ndarray:
    """Weights [r s t] of the ordered blocks at the rates and effective SNRs above, and equal ones."""
    counts = [codec.num_symbols(rate) for rate in RATES if codec.num_symbols(rate) >= num_blocks]
    require(bool(counts), "--blocks", num_blocks, f"at most {codec.num_symbols(1.0)} for this codec")
    table = [[np.asarray(codec.block_weights(k, s, num_blocks)) for s in GRID_DB] for k in counts]
    return np.stack([*np.asarray(table), np.ones((len(GRID_DB), num_blocks))])


def make_recipe(args: Arguments) -> PowerRecipe:
    """The preset with the arguments' changes; ValueError on bad ones."""
    check_seed(args.seed)
    recipe, law = PRESETS[args.preset], {"rayleigh": RayleighFading(), "jakes": None, "gauss-markov": None}
    if args.fading == "gauss-markov":
        law[args.fading] = GaussMarkovFading(args.rho)
    elif args.fading == "jakes":
        law[args.fading] = JakesFading(args.doppler)
    updates = recipe.ppo.num_updates if args.updates is None else args.updates
    envs = recipe.ppo.num_envs if args.envs is None else args.envs
    ppo = dataclasses.replace(recipe.ppo, num_updates=updates, num_envs=envs)
    if args.learning_rate is not None:
        require(args.learning_rate > 0, "--learning-rate", args.learning_rate, "positive")
        recipe = dataclasses.replace(recipe, hyper=recipe.hyper._replace(learning_rate=args.learning_rate))
    changes = {"num_blocks": args.blocks, "history": args.history, "fading": law[args.fading], "seed": args.seed}
    return dataclasses.replace(recipe, ppo=ppo, **changes)


def image_reward(args: Arguments, codec: SeedCodec) -> Quality:
    """The gain in PSNR over the codec's own load, on latents of the cache."""
    count = codec.num_symbols(4.0)

    def reference(gains, snr_db):
        network = nnx.merge(codec.graph, codec.state)
        return link.spending(network.spend(snr_db, count), count, gains.shape[0], "ordered").load

    pipe = StableDiffusion.from_pretrained("scenes")
    return image_quality(pipe, codec, load_latents(args.latents)[:1000], count, reference=reference)


def main(args: Arguments) -> None:
    recipe = make_recipe(args)
    if args.weights == "equal":
        env, params = recipe.environment()
    else:
        codec = SeedCodec.from_pretrained(args.weights)
        env, params = recipe.environment(codec_weights(codec, args.blocks), np.array(GRID_DB))
        if args.reward == "image":
            params = params._replace(weights=params.weights[RATES.index(4.0)][None])
            env = dataclasses.replace(env, quality=image_reward(args, codec))
    start = None if args.start is None else LearnedPower.from_pretrained(args.start, args.blocks)
    require(args.reward == "latent" or args.weights != "equal", "--reward", args.reward, "latent with equal weights")
    name = f"power-{Path(args.weights).name}-{args.fading}-{args.seed}"
    name += f"-history{args.history}" * (args.history > 0) + "-image" * (args.reward == "image")
    folder = args.folder or Path("runs") / name
    described = {"reward": args.reward, "from": args.start}
    policy = train_power(recipe, env, params, folder, start=start, description=described)
    if not is_first():
        return
    destination = args.export or folder / "model"
    policy.save_pretrained(destination)
    seconds = read_json(folder / "seconds.json")["seconds"]
    steps = recipe.ppo.steps(args.blocks)
    rate = steps / seconds if seconds else math.nan
    print(f"policy written to {destination} after {seconds:.0f} s ({steps:,} steps, {rate:,.0f} a second)")


if __name__ == "__main__":
    command("train.power", lambda: main(tyro.cli(Arguments, description=__doc__)), many=True)
