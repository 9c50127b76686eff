"""Early stopping, going back to the start, and learning public samples among one's own."""

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from fedkd.client import trainer
from fedkd.client.local import LocalTraining
from fedkd.client.runtime import Runtime
from fedkd.client.stopping import EarlyStop, accuracy


class Shared(LocalTraining):
    sees_proxy = True


@pytest.fixture
def student(small):
    """A client with a proxy set."""
    scenario = small("fedavg", data__options={"classes": 4, "dimensions": 12, "train": 400, "test": 100})
    runtime = Runtime(scenario)
    runtime.local = Shared(runtime.method)
    with runtime.student(1, 1, Context(0, 0, {}, RecordDict(), {})) as student:
        yield student


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "passes"),
    [
        ([0.1, 0.2, 0.3, 0.4], 1, 0.0, 4),
        ([0.1, 0.2, 0.2, 0.4], 1, 0.0, 3),
        ([0.1, 0.2, 0.2, 0.4, 0.4], 2, 0.0, 5),
        ([0.5, 0.55, 0.65, 0.65], 2, 0.1, 4),  # 0.55 is not better by more than 0.1, 0.65 is
        ([float("nan"), float("nan"), 0.5], 2, 0.0, 2),
    ],
)
def test_patience_counts_passes_without_a_better_score(scores, patience, min_delta, passes):
    each = iter(scores)
    stop = EarlyStop(lambda: next(each), patience=patience, min_delta=min_delta)
    taken = next((n for n in range(1, len(scores) + 1) if stop()), len(scores))
    assert taken == passes


def test_a_training_that_is_stopped_is_the_beginning_of_the_whole(student):
    never, start = EarlyStop(lambda: 0.0, patience=2), {k: v.clone() for k, v in student.state.items()}
    trainer.learn(student, Shared(None), {}, epochs=5, batch_size=8, stop=never)
    stopped, samples = {k: v.clone() for k, v in student.state.items()}, student.samples
    # The first score counts as better than none; two more make it three passes.
    assert samples == 3 * len(student.shard.train)

    student.set_state(start)
    taken = []

    def third():
        taken.append({k: v.clone() for k, v in student.state.items()})
        return float(len(taken))

    trainer.learn(student, Shared(None), {}, epochs=5, batch_size=8, stop=EarlyStop(third, patience=1))
    assert len(taken) == 5 and student.samples == samples + 5 * len(student.shard.train)
    assert all(torch.equal(stopped[k], taken[2][k]) for k in stopped)


def test_looking_at_the_accuracy_does_not_disturb_the_training(student):
    start = {k: v.clone() for k, v in student.state.items()}
    own = student.shard.train
    trainer.learn(student, Shared(None), {}, epochs=3)
    unwatched = {k: v.clone() for k, v in student.state.items()}
    student.set_state(start)
    seen = []

    def look():
        seen.append(accuracy(student, student.data, own))
        return float(len(seen))

    trainer.learn(student, Shared(None), {}, epochs=3, stop=EarlyStop(look, patience=1))
    assert all(torch.equal(unwatched[k], student.state[k]) for k in unwatched)
    labels = np.asarray(student.data.labels)[np.asarray(own)]
    assert seen[-1] == (student.predict(student.data, own).argmax(1).numpy() == labels).mean()


def test_reset_goes_back_to_the_common_start(student):
    start = {k: v.clone() for k, v in student.state.items()}
    trainer.learn(student, Shared(None), {})
    assert any(not torch.equal(start[k], student.state[k]) for k in start)
    student.reset()
    assert all(torch.equal(start[k], student.state[k]) for k in start)


def test_public_samples_are_shuffled_among_the_own(student):
    batches = []

    class Seen(Shared):
        def loss(self, params, batch, out, teachers, aux):
            batches.append(batch)
            return {"ce": 0.0 * out.logits.sum()}

    student.public = torch.tensor([5, 9, 2])
    own = len(student.shard.train)
    trainer.learn(student, Seen(None), {}, epochs=2, batch_size=16)

    x, y, rows = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("x", "y", "ids"))
    assert len(y) == 2 * (own + 3) == student.samples
    assert sorted(rows[: own + 3].tolist()) == list(range(own + 3))
    for position, sample in enumerate(student.public.tolist()):
        at = (rows == position).nonzero().flatten()
        assert len(at) == 2 and (y[at] == -1).all()
        assert torch.equal(x[at[0]], student.proxy.data.gather(np.array([sample])).x[0])
    private = student.data.gather(np.sort(np.asarray(student.shard.train)))
    assert sorted(y[rows >= 3].tolist()) == sorted(private.y.tolist() * 2)
