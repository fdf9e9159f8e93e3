"""What an image costs: sums of the stages by hand, and the work of a link as compiled."""

import pytest

from megjax.system import Resources, Work, measure_work, scheme_cost

WORK = Work(text=1e3, step=1e5, image=1e4, code=10.0, decode=100.0)
RESOURCES = Resources(bandwidth_hz=1e3, transmit_power_w=2.0, server_flops_per_s=1e6, device_flops_per_s=1e4)


@pytest.mark.parametrize(
    ("scheme", "options", "symbols", "server", "device"),
    [
        ("seed", {}, 16, 1e3 + 2e5 + 10, 100 + 1e4),
        ("centralized", {}, 384, 1e3 + 2e5 + 10 + 1e4, 100),
        ("split", {"server_steps": 1, "device_steps": 3}, 32, 1e3 + 1e5 + 10, 100 + 1e4 + 1e3 + 3e5),
        ("prompt", {"device_steps": 2}, 0, 0, 100 + 1e4 + 1e3 + 2e5),
    ],
)
def test_costs_by_hand(make, scheme, options, symbols, server, device):
    cost = scheme_cost(make(scheme, **options), WORK, RESOURCES)
    assert cost.num_symbols == symbols and cost.bandwidth_ratio == pytest.approx(symbols / (3 * 16 * 16))
    assert cost.airtime_s == pytest.approx(symbols / 1e3) and cost.energy_j == pytest.approx(2 * symbols / 1e3)
    assert cost.server_flops == pytest.approx(server) and cost.device_flops == pytest.approx(device)
    assert cost.latency_s == pytest.approx(server / 1e6 + symbols / 1e3 + device / 1e4)


def test_at_equal_energy_symbols_have_what_the_raw_latent_has(make):
    cost = scheme_cost(make(mode="equal_energy"), WORK, RESOURCES)
    assert cost.energy_j == pytest.approx(2 * 32 / 1e3)
    given = scheme_cost(make("centralized-coded", mode="equal_energy"), WORK, RESOURCES, num_symbols=64.0)
    assert given.num_symbols == 64 and given.energy_j == pytest.approx(2 * 32 / 1e3)


def test_work_of_a_link_beside_known_networks(pipe, make):
    found = measure_work(make("latent"), pipe.tokenize(["a red house"]), WORK)
    assert (found.text, found.step, found.image) == (WORK.text, WORK.step, WORK.image)
    assert found.decode == 2 * 64  # each value is scaled and shifted
    assert found.code > 2 * 64  # and the blocks' powers are worked out


def test_bad_input(make):
    with pytest.raises(ValueError, match=r"bandwidth_hz is 0\.0.*positive"):
        Resources(bandwidth_hz=0.0)
    with pytest.raises(ValueError, match="num_symbols is None"):
        scheme_cost(make("centralized-coded"), WORK)
