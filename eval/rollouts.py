"""Channel rollouts without images: fading traces, and bit error rates of every modulation on their closed forms."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from eval.plots import panels, save
from megjax import channel
from megjax.channel import theory
from megjax.configs import require_positive_integers, write_json
from megjax.keys import from_seed
from megjax.runtime import check_seed, command, prepare_output
from megjax.units import db_to_linear, linear_to_db, noise_var_from_snr_db

SNRS_DB = tuple(range(-5, 45, 5))
FADINGS = {"AWGN": channel.NoFading(), "Rayleigh": channel.RayleighFading()}
THEORY = {"AWGN": theory.ber_awgn, "Rayleigh": theory.ber_rayleigh}
BLOCKS = 64
"""Blocks a realisation, one symbol each: its symbols fade independently."""
TRACE_BLOCKS = 200
APART_DB = 40


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How much to draw and where the results go."""

    num: int = 20_000
    """Realisations of 64 symbols for each modulation and channel; every SNR sees the same draws."""
    chunk: int = 4_096
    """Realisations at a time."""
    seed: int = 0
    """Seed of everything drawn."""
    output: Path = Path("outputs/channel")
    """Folder for ber.json and channel.png."""


def count_errors(key, noise_vars, fading, modulation: str):
    """Bit error rate at each noise variance [s] of one realisation: bits, gains, noise, zero forcing, decisions."""
    bit_key, fading_key, noise_key = jax.random.split(key, 3)
    bits = jax.random.bernoulli(bit_key, shape=(BLOCKS * channel.bits_per_symbol(modulation),))
    symbols = channel.modulate(bits, modulation)[:, None]
    gains, power = fading.sample(fading_key, BLOCKS), jnp.ones(BLOCKS)

    def at(noise_var):
        received = channel.transmit(noise_key, symbols, gains, power, noise_var)
        return jnp.mean(channel.demodulate(channel.equalize_zf(received, gains, power)[:, 0], modulation) != bits)

    return jax.vmap(at)(noise_vars)


def bit_error_rates(args: Arguments) -> list[dict]:
    """One row per channel, modulation and SNR: simulated rate, its standard error, and the closed form."""
    snr_db = np.array(SNRS_DB, np.float32)
    noise_vars, snr = noise_var_from_snr_db(snr_db), db_to_linear(snr_db)
    rows = []
    pairs = [(name, modulation) for name in FADINGS for modulation in channel.MODULATIONS]
    for i, (name, modulation) in enumerate(tqdm(pairs, desc="bit error rates", disable=None)):

        def fn(key, noise_vars, fading, modulation=modulation):
            return count_errors(key, noise_vars, fading, modulation)

        key = jax.random.fold_in(from_seed(args.seed), i)
        drawn = channel.rollout(key, fn, args.num, args.chunk, args=(noise_vars, FADINGS[name]), progress=False)
        exact = np.asarray(THEORY[name](snr, modulation), np.float64)
        for level, mean, error, closed in zip(SNRS_DB, drawn.mean, drawn.standard_error, exact, strict=True):
            row = {"channel": name, "modulation": modulation, "snr_db": level, "num": args.num}
            rows.append({**row, "ber": float(mean), "standard_error": float(error), "theory": float(closed)})
    return rows


def traces(seed: int) -> dict[str, np.ndarray]:
    """Gains in dB [t] of one realisation of some fading laws."""
    laws = {
        "independent Rayleigh blocks": channel.RayleighFading(),
        "Jakes, Doppler 0.01 a block": channel.JakesFading(0.01),
        "Rician K = 10, shadowed by 4 dB": channel.ShadowedFading(channel.RicianFading(10.0), 4.0),
        "Gauss-Markov, rho = 0.98": channel.GaussMarkovFading(0.98),
    }
    keys = jax.random.split(jax.random.fold_in(from_seed(seed), 2**31), len(laws))
    samples = {name: law.sample(key, TRACE_BLOCKS) for key, (name, law) in zip(keys, laws.items(), strict=True)}
    return {name: np.asarray(linear_to_db(jnp.abs(gains) ** 2)) for name, gains in samples.items()}


def draw(path: Path, levels: dict[str, np.ndarray], rows: list[dict]) -> None:
    """Left: traces. Middle and right: bit error rates, closed forms as lines and simulations as points."""
    figure, ((left, *others),) = panels(1, 3, (13, 4))
    for i, (name, level) in enumerate(levels.items()):
        left.plot(level - APART_DB * i, linewidth=1.1, color=f"C{i}")
        left.axhline(-APART_DB * i, color=f"C{i}", linewidth=0.5, alpha=0.5)
        left.text(1, 9 - APART_DB * i, name, color=f"C{i}", fontsize=9)
    label = rf"$|h|^2$ (dB), each trace {APART_DB} dB lower"
    left.set(xlabel="block", ylabel=label, title="Fading", ylim=(-30 - APART_DB * (len(levels) - 1), 18))
    fine_db = np.linspace(SNRS_DB[0], SNRS_DB[-1], 226, dtype=np.float32)
    for axis, name in zip(others, FADINGS, strict=True):
        for i, modulation in enumerate(channel.MODULATIONS):
            axis.semilogy(fine_db, THEORY[name](db_to_linear(fine_db), modulation), color=f"C{i}", linewidth=1)
            points = [r for r in rows if r["channel"] == name and r["modulation"] == modulation and r["ber"] > 0]
            columns = [[r[column] for r in points] for column in ("snr_db", "ber", "standard_error")]
            errors = 1.96 * np.array(columns[2])
            style = {"fmt": "o", "markersize": 4, "color": f"C{i}", "capsize": 2}
            axis.errorbar(*columns[:2], errors, label=modulation.upper(), **style)
        axis.set(xlabel="SNR per symbol (dB)", ylabel="bit error rate", title=name, ylim=(1e-6, 1), xlim=(-6, 41))
        axis.grid(alpha=0.3)
    others[1].legend(fontsize=9, loc="lower left")
    place = {"transform": others[0].transAxes, "ha": "right", "va": "top"}
    others[0].text(0.97, 0.97, "lines: theory\npoints: simulation, 95 %", **place)
    save(figure, path)


def run(args: Arguments) -> list[dict]:
    """Draw, save, report; returns the rows of ber.json. Raises ValueError on bad arguments, before any work."""
    require_positive_integers(args, "arguments", ("num", "chunk"))
    check_seed(args.seed)
    prepare_output(args.output)
    rows = bit_error_rates(args)
    write_json(args.output / "ber.json", rows)
    draw(args.output / "channel.png", traces(args.seed), rows)
    scores = [(r["ber"] - r["theory"]) / r["standard_error"] for r in rows if r["standard_error"] > 0]
    rms, largest = np.sqrt(np.mean(np.square(scores))), np.max(np.abs(scores))
    print(
        f"{len(scores)} of {len(rows)} points saw bit errors; their distance from theory in standard errors: ", end=""
    )
    print(f"root mean square {rms:.2f}, largest {largest:.1f}")
    print(f"picture: {args.output / 'channel.png'}\nnumbers: {args.output / 'ber.json'}")
    return rows


def main() -> None:
    command("eval.rollouts", lambda: run(tyro.cli(Arguments, description=__doc__)))


if __name__ == "__main__":
    main()
