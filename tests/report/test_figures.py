import numpy as np
import pytest

from fedkd.report import learning_curves, partition_figure
from fedkd.report.figures import _mean_and_sd, _spread

ONE = [(1, 0.1), (2, 0.3)]
TWO = [ONE, [(1, 0.3), (2, 0.3), (3, 0.5)]]


def test_seeds_become_mean_and_band():
    rounds, mean, sd = _mean_and_sd(TWO)
    assert rounds.tolist() == [1, 2, 3]
    assert mean == pytest.approx([0.2, 0.3, 0.5])
    assert sd == pytest.approx([0.02**0.5, 0, 0])  # round 3 has one seed


def test_points_are_drawn_at_the_mean_of_their_third_numbers():
    places, mean, _ = _mean_and_sd([[(1, 0.1, 30.0), (2, 0.3, 70.0)], [(1, 0.3, 40.0)]])
    assert places.tolist() == [35, 70]
    assert mean == pytest.approx([0.2, 0.3])


def test_one_run_has_no_band_and_gaps_are_left_out():
    rounds, mean, sd = _mean_and_sd([(1, 0.1), (2, float("nan")), (4, 0.2)])
    assert rounds.tolist() == [1, 4]
    assert mean.tolist() == [0.1, 0.2]
    assert not sd.any()


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: learning_curves({"fedavg": ONE, "a_$b": TWO, "short": [(1, 0.2)]}, path, "title"),
        lambda path: learning_curves({"a": [(1, 0.1, 5e3), (2, 0.2, 2e4)]}, path, xlabel="simulated seconds"),
        lambda path: partition_figure(np.array([[3, 0], [0, 0], [40, 7]]), ["cat", "dog"], path, "title"),
        lambda path: partition_figure(np.arange(150).reshape(50, 3), ["a", "b", "c"], path),
    ],
    ids=["curves", "curves over time", "bubbles", "heat map"],
)
def test_figures_are_written_twice_with_equal_bytes(draw, tmp_path):
    first = draw(tmp_path / "alpha-0.1")
    second = draw(tmp_path / "again" / "alpha-0.1.png")

    assert [file.name for file in first] == ["alpha-0.1.png", "alpha-0.1.svg"]
    assert first[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert b"<dc:date>" not in first[1].read_bytes()


def test_the_users_matplotlib_settings_neither_matter_nor_change(tmp_path):
    import matplotlib

    expected = learning_curves({"a": ONE}, tmp_path / "a")[1].read_bytes()
    with matplotlib.rc_context({"font.size": 30}):
        assert learning_curves({"a": ONE}, tmp_path / "b")[1].read_bytes() == expected
        assert matplotlib.rcParams["font.size"] == 30


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no curve"):
        learning_curves({"a": []}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"\(0, 2\)"):
        partition_figure(np.zeros((0, 2)), ["a", "b"], tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wanted", [[0.5] * 4, [1.0, 0.99, 0.98], [0.0, 0.01, 0.5, 0.02], [0.3]])
def test_names_never_overlap_and_keep_their_order(wanted):
    heights = _spread(wanted, 0.1)
    ordered = np.array(heights)[np.argsort(wanted, kind="stable")]
    assert (np.diff(ordered) >= 0.1 - 1e-9).all()
    assert min(heights) >= -1e-9 and max(heights) <= 1 + 1e-9
