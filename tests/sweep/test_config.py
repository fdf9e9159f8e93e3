"""Tests of a sweep's settings: which points they make, and one clear line for what they cannot mean."""

import dataclasses
import math

import pytest

from megjax.channel import RicianFading
from megjax.sweep import SweepConfig
from megjax.sweep.identity import sweep_fading, sweep_policy

pytestmark = pytest.mark.usefixtures("unchecked")
SMALL = SweepConfig(schemes=("seed", "latent"), snr_db=(0.0,), rates=(2.0, 4.0))


def points(**changes):
    return dataclasses.replace(SMALL, **changes).points()


def test_a_point_has_only_what_its_scheme_has():
    found = points(schemes=("seed", "latent", "split", "centralized"), device_steps=(1, 5), policies=("codec", "equal"))
    count = {scheme: sum(point.scheme == scheme for point in found) for scheme in ("seed", "latent", "split")}
    # Seed: 2 modes x 2 rates x 2 policies; latent: 2 modes; split: 2 modes x 2 numbers of device steps.
    assert count == {"seed": 8, "latent": 2, "split": 4}
    assert len(found) == 8 + 2 + 4 + 2 == len(set(found))
    for point in found:
        assert (point.rate != 1.0) == (point.scheme == "seed")
        assert (point.device_steps > 0) == (point.scheme == "split")
        assert point.policy == "equal" or point.scheme == "seed"


def test_nothing_sent_is_one_measurement():
    found = points(schemes=("prompt",), device_steps=(1, 5), rates=(2.0, 4.0), policies=("codec", "equal"))
    assert len(found) == 2 * len(SMALL.modes) * len(SMALL.snr_db) and len({point.physics() for point in found}) == 2


def test_a_split_seed_has_a_rate_a_load_and_device_steps():
    found = points(schemes=("split-seed",), device_steps=(1, 5), rates=(2.0, 4.0), policies=("codec",))
    assert {(point.rate, point.device_steps, point.policy) for point in found} == {
        (rate, steps, "codec") for rate in (2.0, 4.0) for steps in (1, 5)
    }


def test_equal_energy_of_the_latent_is_equal_power():
    latent = [point for point in points() if point.scheme == "latent"]
    assert len(latent) == 2 and len({point.physics() for point in latent}) == 1
    assert len({point.physics() for point in points(schemes=("seed",), rates=(1.0,))}) == 1
    assert len({point.physics() for point in points(schemes=("seed",))}) == 4
    assert len({point.physics() for point in points(schemes=("centralized",))}) == 2


def test_the_limit_has_rates_but_no_policy():
    found = points(schemes=("opta",), policies=("equal", "dp"), metrics="latent", modes=("equal_energy",))
    assert [(point.rate, point.policy) for point in found] == [(2.0, "equal"), (4.0, "equal")]


def test_points_are_in_the_order_of_the_lists():
    found = points(schemes=("latent", "seed"), snr_db=(5.0, 0.0), rates=(4.0,), modes=("equal_power",), seeds=(3, 1))
    assert [(point.seed, point.scheme, point.snr_db) for point in found] == [
        (seed, scheme, snr_db) for seed in (3, 1) for scheme in ("latent", "seed") for snr_db in (5.0, 0.0)
    ]


def test_integers_are_numbers():
    assert points(snr_db=(0,), rates=(2, 4), peak_powers=(2,)) == points(peak_powers=(2.0,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schemes": ("seed", "pigeon")}, "schemes is 'pigeon'; it must be one of seed, "),
        ({"schemes": ()}, r"schemes is \(\); it must be one value or more, all different"),
        ({"snr_db": (0.0, 5.0, 0.0)}, "snr_db is .*all different"),
        ({"rates": (4, 4.0)}, "rates is .*all different"),
        ({"snr_db": (math.nan,)}, "snr_db is .*finite"),
        ({"snr_db": (math.inf,)}, "snr_db is .*finite"),
        ({"modes": ("equal",)}, "modes is 'equal'"),
        ({"peak_powers": (0.0,)}, r"peak_powers is \(0.0,\); it must be positive"),
        ({"peak_powers": (math.nan,)}, "peak_powers is .*positive"),
        ({"seeds": (-1,)}, r"seed is -1; it must be in \[0, 2\^32\)"),
        ({"seeds": (0.5,)}, "seeds is 0.5; it must be an integer"),
        ({"steps": 4, "server_steps": (5,)}, r"server_steps is \(5,\); it must be from 0 \(all\) to steps, 4"),
        ({"server_steps": (1.5,)}, "server_steps is"),
        ({"device_steps": (0,)}, "device_steps is"),
        ({"schemes": ("opta",)}, "schemes is 'opta'; it must be ones with images"),
        ({"schemes": ("centralized",), "metrics": "latent"}, "schemes is .*for latent metrics"),
        ({"schemes": ("seed:rate=2",)}, "schemes is 'seed:rate=2'; it must be without its rate"),
        ({"metrics": "sound"}, "metrics is 'sound'"),
        ({"num_images": 1}, "num_images is 1; it must be 2 or more"),
        ({"num_images": 0}, "num_images is 0"),
        ({"realisations": 0}, "realisations is 0"),
        ({"guidance": math.nan}, "guidance is nan"),
    ],
)
def test_bad_settings_are_one_clear_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(SMALL, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rice", "fadings is 'rice'; it must be among rayleigh, awgn, rician:K in dB"),
        ("rician", "fadings is 'rician'; it must be rician:NUMBER, the K in dB"),
        ("rician:x", "fadings is 'rician:x'; after the colon comes the K in dB .*'x'"),
        ("nakagami:0.1", "fadings is 'nakagami:0.1'; after the colon comes the m .*0.5 or more"),
        ("rayleigh:3", "fadings is 'rayleigh:3'; it must be rayleigh alone"),
        ("no_such_module:Law", "fadings is 'no_such_module:Law', which cannot be imported: No module"),
        ("megjax.channel:NoSuchLaw", "fadings is 'megjax.channel:NoSuchLaw', which cannot be imported"),
        (
            "megjax.channel:MAPPINGS",
            "fadings is 'megjax.channel:MAPPINGS'; it must be an object with a method 'sample'",
        ),
        ("megjax.channel:RicianFading", "which cannot be made without arguments: .*k_factor"),
    ],
)
def test_bad_laws_are_one_clear_line(name, message):
    with pytest.raises(ValueError, match=message) as error:
        sweep_fading(name)
    assert "\n" not in str(error.value)


def test_laws_by_name_and_by_import_path():
    law = sweep_fading("rician:10")
    assert isinstance(law, RicianFading) and law.k_factor == pytest.approx(10.0)
    assert type(sweep_fading("megjax.channel:RayleighFading")).__name__ == "RayleighFading"


def test_policies_by_name_and_by_import_path():
    assert sweep_policy("dp") == "dp"
    assert callable(sweep_policy("megjax.power:EqualPower").allocate)
    for name in ("greedy", "megjax.power:POLICIES", "megjax.power:Nothing"):
        with pytest.raises(ValueError, match=r"policies \(of equal, .*") as error:
            sweep_policy(name)
        assert name in str(error.value) and "\n" not in str(error.value)
