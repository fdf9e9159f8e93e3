"""Runs docs/tutorial.md as it stands: its module is saved, its blocks run in order, its command in a process."""

import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.processes import Processes, run_module

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("module_unchecked", "fast_compile", "module_usual_promotion")]
ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def names(module_unchecked, fast_compile, module_usual_promotion, tmp_path_factory):
    """What the page's script leaves behind."""
    folder, found = tmp_path_factory.mktemp("tutorial"), {}
    with pytest.MonkeyPatch.context() as patch, Processes(folder / "processes") as processes:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        for kind, text in BLOCKS:
            if text.startswith("# mine.py\n"):
                (folder / "mine.py").write_text(text)
            elif kind == "python":
                exec(compile(text, "docs/tutorial.md", "exec"), found)
            else:
                python, option, *words = shlex.split(text.replace("\\\n", " "))
                assert (python, option, words[0]) == ("python", "-m", "eval.sweep")
                processes.run(run_module, *words, fast_compile=True)
        yield found
    sys.modules.pop("mine", None)


def test_the_blocks_are_those_that_were_meant():
    assert [kind for kind, _ in BLOCKS] == ["python"] * 5 + ["sh"] + ["python"] * 2


def test_own_law(names):
    # E g^2 = 2 (3 + 0.05^2) / 4 / 0.7625^2 = 2.58 and blocks correlate by 0.6: 20,000 x 16 gains give 0.004 or less.
    assert abs(float(names["mean_power"]) - 1) < 4 * 0.006
    clear = 1 / 0.7625
    expected = 0.75 * (1 - np.exp(-0.1 / clear)) + 0.25 * (1 - np.exp(-0.1 / (0.05 * clear)))
    assert abs(float(names["outage"]) - expected) < 4 * 0.004
    assert round(float(names["outage"]), 2) == 0.25


def test_one_simulation(names):
    sent = names["sent"]
    assert sent.source.images.shape == (2, 64, 64, 3) and sent.delivery.images.shape == (2, 3, 64, 64, 3)
    power, gains = np.asarray(sent.delivery.power), np.abs(np.asarray(sent.delivery.gains)) ** 2
    assert (power[..., :-1][gains[..., :-1] < 0.1] == 0).all() and (power[..., :-1][gains[..., :-1] >= 0.1] > 0).all()
    np.testing.assert_allclose(power.mean(-1), 1.0, rtol=1e-5)
    assert (np.asarray(sent.delivery.num_symbols) == 64).all()


def test_the_identity_is_the_raw_latent(names):
    raw, own, pca = (np.asarray(names["errors"][name]) for name in ("raw", "own", "pca"))
    np.testing.assert_allclose(own, raw, rtol=1e-4)
    assert (np.diff(raw) < 0).all() and (np.diff(pca) < 0).all()
    assert own.shape == (3,) and pca[0] < raw[0]
    assert names["pca"].link.num_symbols == 32 and names["raw"].link.num_symbols == 128


def test_gradients_reach_codec_and_law(names):
    value, slope = float(names["value"]), names["slope"]
    assert value == pytest.approx(float(names["errors"]["pca"][1]), rel=1e-4)
    basis = np.asarray(slope["codec"].basis)
    assert basis.shape == (256, 256) and np.isfinite(basis).all() and np.abs(basis).max() > 0
    assert float(slope["fading"].loss) < 0
    # A central difference; the error is smooth in the loss for given draws.
    step, params, error = 2e-3, names["pca"].params, jax.jit(names["loss"])

    def at(loss):
        return float(error({**params, "fading": names["Blockage"](0.1, 0.3, jnp.float32(loss))}))

    difference = (at(0.05 + step) - at(0.05 - step)) / (2 * step)
    assert float(slope["fading"].loss) == pytest.approx(difference, rel=0.05)


def test_the_sweep(names):
    frame = names["frame"]
    assert set(frame.policy) == {"equal", "mine:SkipFades"} and set(frame.fading) == {"mine:Blockage"}
    assert len(frame) == 8 and (frame.n == 40).all() and frame.psnr_db.notna().all()
    assert names["gain_db"].shape == (20,) and names["low"] <= names["gain_db"].mean() <= names["high"]
