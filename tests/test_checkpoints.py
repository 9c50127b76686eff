"""Checkpoints cost as much as the clients that took part, and keep what every one of them had."""

import torch
from flwr.app import ArrayRecord, RecordDict

from fedkd import checkpoint, checkpoints
from fedkd.arrays import BufferArray, view
from fedkd.checkpoints import Checkpoints


class Strategy:
    round = 0

    def state_dict(self):
        return {"round": self.round}


class Server:
    def __init__(self):
        self.traffic = {"up": {}, "down": {}}


class Grid:
    """Holds the states that changed since they were asked for."""

    def __init__(self):
        self.changed = {}

    def take_changed(self):
        changed, self.changed = self.changed, {}
        return iter(changed.items())


def state(value):
    return RecordDict({"s": ArrayRecord({"x": BufferArray(torch.tensor([value]).numpy())})})


def values(states):
    return {p: float(view(s["s"]["x"])[0]) for p, s in dict(states).items()}


def saved(tmp_path, rounds):
    """Save rounds of changes, as a run does; return the writer."""
    writer, strategy, grid = Checkpoints(tmp_path), Strategy(), Grid()
    for changes in rounds:
        strategy.round += 1
        grid.changed = {p: None if value is None else state(value) for p, value in changes.items()}
        writer.save(strategy, Server(), grid, 0.0)  # type: ignore[arg-type]
    return writer


def test_states_come_from_the_round_in_which_they_changed_last(tmp_path):
    saved(tmp_path, [{0: 0.1, 1: 1.1, 2: 2.1}, {1: 1.2}, {2: None, 3: 3.3}])

    loaded = Checkpoints(tmp_path)
    tree, states = loaded.load()
    assert tree["round"] == 3
    assert values(states) == {p: torch.tensor(x).item() for p, x in {0: 0.1, 1: 1.2, 3: 3.3}.items()}
    assert loaded.state_of(1)[0] == 2 and values({1: loaded.state_of(1)[1]})[1] == torch.tensor(1.2).item()
    assert loaded.state_of(2) == (0, None)


def test_only_what_changed_is_written_and_what_nobody_needs_is_removed(tmp_path):
    saved(tmp_path, [{p: float(p) for p in range(50)}, {7: 0.0}, {8: 0.0}, {p: 1.0 for p in range(50)}, {}, {}])
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    assert folders == ["clients-000004", "round-000005", "round-000006"]


def test_the_checkpoint_before_stays_complete(tmp_path):
    saved(tmp_path, [{0: 0.1, 1: 1.1}, {0: 0.2, 1: 1.2}])
    (tmp_path / "checkpoints" / "round-000002" / "tree.json").write_text("cut off")

    tree, states = Checkpoints(tmp_path).load()
    assert tree["round"] == 1
    assert values(states) == {0: torch.tensor(0.1).item(), 1: torch.tensor(1.1).item()}


def test_states_that_cannot_be_read_make_a_checkpoint_unreadable(tmp_path):
    saved(tmp_path, [{0: 0.1}, {0: 0.2}])
    file = tmp_path / "checkpoints" / "clients-000002" / "000000" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])

    assert Checkpoints(tmp_path).load()[0]["round"] == 1


def test_states_are_written_and_read_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PART", 8)  # two numbers
    written = saved(tmp_path, [{p: float(p) for p in range(5)}])
    assert len(list((tmp_path / "checkpoints" / "clients-000001").iterdir())) == 3
    assert values([(4, written.state_of(4)[1])]) == {4: 4.0}

    read = []
    monkeypatch.setattr(checkpoint, "load", lambda part, load=checkpoint.load: read.append(part.name) or load(part))
    _, states = Checkpoints(tmp_path).load()
    assert next(states)[0] == 0 and read == ["round-000001", "000000"]  # the others when their turn comes
    assert values(states) == {p: float(p) for p in range(1, 5)}


def test_after_resuming_the_checkpoint_before_stays_complete_too(tmp_path):
    saved(tmp_path, [{0: 0.1, 1: 1.1}, {0: 0.2}])
    resumed, strategy, grid = Checkpoints(tmp_path), Strategy(), Grid()
    resumed.load()
    strategy.round, grid.changed = 3, {0: state(0.3), 1: state(1.3)}
    resumed.save(strategy, Server(), grid, 0.0)  # type: ignore[arg-type]

    (tmp_path / "checkpoints" / "round-000003" / "tree.json").unlink()
    assert values(Checkpoints(tmp_path).load()[1]) == {0: torch.tensor(0.2).item(), 1: torch.tensor(1.1).item()}
