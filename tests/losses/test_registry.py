import math
from typing import NamedTuple

import pytest
import torch

from fedkd import losses
from fedkd.errors import ScenarioError
from fedkd.models import Outputs


class Labelled(NamedTuple):
    y: torch.Tensor


BATCH = Labelled(torch.tensor([0, 1, 2, 0]))


def outputs(seed: int, width: int = 6) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    taps = (torch.randn(4, 2, 5, 5, generator=g), torch.randn(4, 3, 2, 2, generator=g))
    return Outputs(torch.randn(4, 3, generator=g), torch.randn(4, width, generator=g), taps)


@pytest.mark.parametrize("name", losses.names())
def test_every_term_is_zero_for_equal_models_and_positive_else(name):
    term = losses.term(name)
    a, b = outputs(0), outputs(1)
    assert term(a, a, BATCH, temperature=2.0).item() == pytest.approx(0, abs=1e-5)
    assert term(a, b, BATCH, temperature=2.0).item() > 1e-4
    assert losses.describe(name)


def test_kd_term_is_batchmean_with_t_squared():
    # Probabilities at T = 2: student (1/2, 1/2), teacher (4/5, 1/5).
    student = Outputs(torch.zeros(1, 2), torch.zeros(1, 1))
    teacher = Outputs(torch.tensor([[2 * math.log(4), 0.0]]), torch.zeros(1, 1))
    batch = Labelled(torch.tensor([0]))
    kl = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert losses.term("kd")(student, teacher, batch, temperature=2.0).item() == pytest.approx(4 * kl)
    plain = losses.term("kd")(student, teacher, batch, temperature=2.0, t_squared=False, reduction="mean_all")
    assert plain.item() == pytest.approx(kl / 2)
    assert losses.term("ntd")(student, teacher, batch, temperature=2.0).item() == 0
    assert losses.term("mse")(student, teacher, batch, temperature=2.0).item() == pytest.approx(
        (2 * math.log(4)) ** 2 / 2
    )
    assert losses.term("mae")(student, teacher, batch, temperature=2.0).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("name", ["sp", "cc", "pkt", "rkd"])
def test_relation_terms_take_models_of_unequal_width(name):
    assert losses.term(name)(outputs(0), outputs(1, width=9), BATCH, temperature=1.0).isfinite()
    on_tap = losses.term(name)(outputs(0), outputs(1, width=9), BATCH, temperature=1.0, layer=-1)
    assert on_tap.isfinite()


def test_hint_of_unequal_widths_says_what_to_use():
    with pytest.raises(ScenarioError, match="sp, pkt"):
        losses.term("hint")(outputs(0), outputs(1, width=9), BATCH, temperature=1.0)


def test_layers_and_maps_that_are_not_there_are_refused():
    vectors = Outputs(torch.zeros(4, 3), torch.zeros(4, 6))
    with pytest.raises(ScenarioError, match="has 0 taps"):
        losses.term("sp")(vectors, vectors, BATCH, temperature=1.0, layer=0)
    with pytest.raises(ScenarioError, match="attention: student has 0 maps"):
        losses.term("attention")(vectors, vectors, BATCH, temperature=1.0)


def test_unknown_loss_names_the_nearest():
    with pytest.raises(ScenarioError, match="did you mean 'attention'") as error:
        losses.term("atention")
    assert error.value.key == "client.terms"


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("kd", {"temprature": 2.0}, "no option 'temprature'"),
        (
            "kd",
            {"temperature": 2.0},
            "no option 'temperature'",
        ),  # a key of the term, not an option of the loss
        ("kd", {"reduction": "mean"}, "reduction must be one of 'batchmean', 'mean_all', is 'mean'"),
        ("kd", {"t_squared": "yes"}, "t_squared must be true or false, is 'yes'"),
        ("dkd", {"beta": -1}, "beta must be a number >= 0, is -1"),
        ("dkd", {"beta": math.nan}, "beta must be a number >= 0, is nan"),
        ("sp", {"layer": "last"}, "layer must be 'features' or a whole number, is 'last'"),
        ("no_such_module_:loss", {}, "no_such_module_"),
        ("math:pi", {}, "not a function"),
        ("builtins:max", {}, "cannot be called as a term"),
        ("math:sin", {}, "cannot be called as a term"),
    ],
)
def test_wrong_options_are_found_before_training(name, options, says):
    with pytest.raises(ScenarioError, match=says) as error:
        losses.check_term(name, options)
    assert error.value.key == "client.terms"


def test_right_options_pass():
    losses.check_term("kd", {"direction": "symmetric", "t_squared": False})
    losses.check_term("dkd", {"alpha": 1, "beta": 2.5})
    losses.check_term("hint", {"layer": -1, "reduction": "batchmean"})
    losses.check_term("sp", {"layer": "features"})


def test_a_loss_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_own_losses.py").write_text(
        "def l1(out, teacher_out, batch, *, temperature, scale: float = 1.0):\n"
        "    '''My own.'''\n"
        "    return scale * (out.logits - teacher_out.logits).abs().sum()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    losses.check_term("my_own_losses:l1", {"scale": 2})
    with pytest.raises(ScenarioError, match="no option 'scal'"):
        losses.check_term("my_own_losses:l1", {"scal": 2})
    a, b = outputs(0), outputs(1)
    loss = losses.term("my_own_losses:l1")(a, b, BATCH, temperature=1.0, scale=2.0)
    assert loss.item() == pytest.approx(2 * (a.logits - b.logits).abs().sum().item())
    assert losses.describe("my_own_losses:l1") == "My own."
