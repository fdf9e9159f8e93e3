"""Constants of the source: files and checks."""

import pytest

from megjax.system import STATISTICS_NAME, SourceStatistics

STATISTICS = SourceStatistics((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), (0.5, -0.2, 0.0, 0.1), (1.2, 0.8, 1.0, 0.9))


def test_statistics_round_trip_and_are_checked(tmp_path):
    STATISTICS.save(tmp_path)
    assert SourceStatistics.load(tmp_path) == STATISTICS
    with pytest.raises(ValueError, match="pixel_std is"):
        SourceStatistics(pixel_std=(0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="latent_std is"):
        SourceStatistics(latent_std=(1.0,))
    with pytest.warns(UserWarning, match=STATISTICS_NAME):
        assert SourceStatistics.load(tmp_path / "none", 8).latent_std == (1.0,) * 8
