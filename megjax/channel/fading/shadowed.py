"""Log-normal shadowing on top of another law of fading."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Complex, Key

from megjax.channel.fading.base import FADINGS, Fading, FadingLaw
from megjax.channel.fading.independent import RayleighFading
from megjax.channel.parameters import channel_model, check, scalar
from megjax.channel.random import split
from megjax.units import db_to_linear


@channel_model
class ShadowedFading:
    """Log-normal shadowing on top of another law: one factor per realisation, the same for all blocks of an image.

    h_t = 10^(X / 20) f_t / sqrt(E 10^(X / 10)) with X ~ N(0, sigma_db^2) in dB and f_t the gains of `fading`, any
    `Fading` that is a pytree. The linear mean E 10^(X / 10) = exp((sigma_db ln 10 / 10)^2 / 2) keeps E|h_t|^2 = 1: the
    median power is then below 0 dB, by sigma_db^2 ln 10 / 20 dB. G. L. Stüber, "Principles of Mobile Communication",
    4th ed., 2017, section 2.4 (log-normal shadowing and its area mean). Raises ValueError for sigma_db < 0 or not
    finite, or when `fading` has no method `sample`.
    """

    dependence: ClassVar[str] = "other"
    fading: Fading
    sigma_db: ArrayLike

    def __post_init__(self):
        if isinstance(self.fading, type) or not callable(getattr(self.fading, "sample", None)):
            raise ValueError(f"fading is {self.fading!r}; it must have a method sample(key, num_blocks)")
        check("sigma_db", self.sigma_db, "finite and 0 or more, in dB", lambda sigma: sigma >= 0)

    @property
    def mean_gain(self) -> float:
        """E|h|^2, that of `fading`."""
        return getattr(self.fading, "mean_gain", 1.0)

    def sample(self, key: Key[Array, ""], num_blocks: int) -> Complex[Array, " t"]:
        """Gains [t]: those of `fading` times the shadowing of this realisation."""
        sigma_db = scalar("sigma_db", self.sigma_db)
        fading_key, shadow_key = split(key)
        mean_db = jnp.square(sigma_db) * (math.log(10) / 20)
        shadowing_db = sigma_db * jax.random.normal(shadow_key, (), jnp.float32) - mean_db
        shadowing = db_to_linear(shadowing_db / 2).astype(jnp.complex64)
        return shadowing * self.fading.sample(fading_key, num_blocks)


FADINGS.register(
    FadingLaw(
        name="shadowed",
        title="Rayleigh with shadowing",
        version=1,
        rank=70,
        make=lambda sigma_db: ShadowedFading(RayleighFading(), sigma_db),
        parameter="standard deviation of the shadowing in dB",
    )
)
