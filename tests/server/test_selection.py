import numpy as np
import pytest

from fedkd.seeds import Purpose, rng
from fedkd.server.selection import select


def test_selection_depends_on_seed_and_round_alone():
    assert select(range(20), 20, 0.4, seed=0, round=1) == select(np.arange(20), 20, 0.4, seed=0, round=1)
    assert len(select(range(20), 20, 0.4, seed=0, round=1)) == 8
    assert select(range(20), 20, 0.4, seed=0, round=1) != select(range(20), 20, 0.4, seed=0, round=2)
    assert select(range(20), 20, 0.4, seed=0, round=1) != select(range(20), 20, 0.4, seed=1, round=1)


def test_selection_takes_at_least_one_and_at_most_all_eligible():
    assert len(select(range(20), 20, 0.001, seed=0, round=1)) == 1
    assert select([3, 5], 20, 1.0, seed=0, round=1) == [3, 5]


# NumPy draws in one way from few and in another from many, so both are compared.
@pytest.mark.parametrize(("clients", "share"), [(7, 0.5), (500, 0.3), (20_000, 0.5), (20_000, 0.001), (300_000, 1e-4)])
def test_places_are_drawn_as_the_clients_themselves_would_be(clients, share):
    eligible = np.flatnonzero(np.arange(clients) % 5)
    count = max(1, round(share * clients))
    for number in range(1, 4):
        drawn = rng(3, Purpose.SELECTION, number).choice(eligible, min(count, len(eligible)), replace=False)
        assert select(eligible, clients, share, seed=3, round=number) == sorted(drawn.tolist())


def test_only_those_who_are_drawn_are_looked_at():
    class Watched:
        seen = 0

        def __len__(self):
            return 10**12

        def __getitem__(self, place):
            self.seen += 1
            return int(place)

    eligible = Watched()
    assert len(select(eligible, 10**12, 1e-10, seed=0, round=1)) == eligible.seen == 100
