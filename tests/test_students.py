"""What of a model travels, and what the server makes of weights that came without statistics."""

import pytest
import torch

from fedkd.errors import RunError
from fedkd.students import complete, reestimate_norms, snapshot, travelling


def norm_net():
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


def test_params_only_leaves_running_statistics_at_home():
    model = norm_net()
    assert set(travelling(model, "params_only")) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert set(travelling(model, "all")) == set(model.state_dict())


def test_a_snapshot_does_not_follow_the_model():
    model = norm_net()
    kept = snapshot(travelling(model, "all"))
    before = kept["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert torch.equal(kept["0.weight"], before)


class _Rows:
    """Stands in for array data: rows by id."""

    def __init__(self, x):
        self.x = x

    def gather(self, ids, **_):
        return type("Batch", (), {"x": self.x[ids]})


def test_statistics_are_those_of_the_data_by_hand():
    model = torch.nn.BatchNorm1d(1)
    # Batches (0, 4) and (2, 6): means 2 and 4, unbiased variances 8 and 8. The last sample is alone and left out.
    reestimate_norms(model, _Rows(torch.tensor([[0.0], [4.0], [2.0], [6.0], [99.0]])), torch.arange(5), batch_size=2)
    assert float(model.running_mean) == 3.0 and float(model.running_var) == 8.0
    assert model.momentum == 0.1 and not model.training


def test_a_model_is_itself_again_where_statistics_cannot_be_estimated():
    model = torch.nn.BatchNorm1d(1).eval()
    for x, error in ((torch.ones(1, 1), RunError), (torch.ones(4, 2), RuntimeError)):  # alone; of the wrong width
        with pytest.raises(error):
            reestimate_norms(model, _Rows(x), torch.arange(len(x)))
        assert model.momentum == 0.1 and not model.training


def test_weights_that_lack_a_parameter_are_not_completed_by_another_models():
    model = norm_net()
    with pytest.raises(RunError, match=r"lack 0.bias"):
        complete(model, {k: v for k, v in travelling(model, "params_only").items() if k != "0.bias"}, None)


def test_the_servers_statistics_depend_on_the_weights_alone(small, federate):
    scenario = small(
        "fedavg",
        models={"student": "cnn", "norm": "batch", "buffers": "params_only", "options": {}},
        data__options={"classes": 4, "train": 200, "test": 40, "shape": [8, 8]},
        run__rounds=1,
    )
    strategy, _ = federate(scenario)
    server, state = strategy.server, strategy.students["cnn"]
    first = server.complete("cnn", state)
    server.complete("cnn", {name: tensor + 1 for name, tensor in state.items()})  # something else in between
    again = server.complete("cnn", state)
    assert first.keys() > state.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
