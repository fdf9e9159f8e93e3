"""How good a scenes model is: reconstruction, caption accuracy and Frechet distance on held-out scenes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import trange

from megjax.configs import require
from megjax.data import scenes
from megjax.diffusion.pipeline import StableDiffusion
from megjax.keys import from_seed
from megjax.ldm import stages
from megjax.ldm.fitting import captions_of
from megjax.metrics import SceneNet, bootstrap_interval, feature_statistics, frechet_distance, psnr
from megjax.metrics.scenenet import caption_accuracy, labels_from_logits


def interval(values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | None = None) -> dict[str, float]:
    """(Weighted) mean, its 95 % bootstrap interval over images, and their number."""
    low, high = bootstrap_interval(values, weights=weights)
    return {"mean": float(np.average(values, weights=weights)), "low": low, "high": high, "n": len(values)}


def measure(
    pipe: StableDiffusion,
    scenenet: SceneNet,
    num: int = 2000,
    *,
    batch: int = 50,
    num_steps: int = 25,
    guidance_scale: float = 3.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    sampler: str | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Quality on `num` held-out scenes and their captions, phrasings in turn.

    `vae_psnr_db`: decoded mean latents against the renders. `real_accuracy`, `generated_accuracy`: share of stated
    attributes that SceneNet sees in the renders and in images generated from the captions; `exact`: share of images
    with all of them. `scenenet_frechet_distance`: generated images against the renders, in SceneNet features.
    """
    require(num >= 2 and num % batch == 0, "num", num, f"a positive multiple of the batch, {batch}")
    draw = jax.jit(lambda key: stages.draw_scenes(key, batch, pipe.image_size[0], "held_out"))
    look: Callable = jax.jit(lambda images: (lambda f, logits: (f, labels_from_logits(logits)))(*scenenet(images)))
    describe = jax.jit(lambda drawn: (jax.vmap(scenes.labels)(drawn), jax.vmap(scenes.mentioned)(drawn)))
    compare = jax.jit(jax.vmap(psnr))
    scene_key, image_key = jax.random.split(from_seed(seed))
    rows: dict[str, list[Array]] = {}
    for i in trange(num // batch, desc="quality", unit_scale=batch):
        drawn, real = draw(jax.random.fold_in(scene_key, i))
        captions = [row[j % len(row)] for j, row in enumerate(captions_of(drawn))]
        images = pipe.generate(
            jax.random.fold_in(image_key, i),
            pipe.tokenize(captions),
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            sampler=sampler,
        )
        labels, stated = describe(drawn)
        (real_features, seen), (features, found) = look(real), look(images)
        for name, value in {
            "psnr": compare(real, pipe.decode(pipe.encode(real))),
            "stated": stated.sum(1),
            "real_share": caption_accuracy(seen, labels, stated)[0],
            "share": caption_accuracy(found, labels, stated)[0],
            "by_attribute": jnp.where(stated, (found == labels).astype(jnp.float32), jnp.nan),
            "real_features": real_features,
            "features": features,
        }.items():
            rows.setdefault(name, []).append(np.asarray(value))
    table = {name: np.concatenate(parts) for name, parts in rows.items()}
    distance = frechet_distance(*feature_statistics(table["real_features"]), *feature_statistics(table["features"]))
    weights = table["stated"].astype(float)  # captions that state more weigh more
    accuracy = np.nanmean(table["by_attribute"], axis=0)
    return {
        "vae_psnr_db": interval(table["psnr"]),
        "real_accuracy": interval(table["real_share"], weights),
        "generated_accuracy": interval(table["share"], weights),
        "generated_exact": interval((table["share"] == 1).astype(float)),
        "scenenet_frechet_distance": {"mean": distance, "n": num},
        "by_attribute": {name: float(value) for (name, _), value in zip(scenes.ATTRIBUTES, accuracy, strict=True)},
    }
