import pytest
import torch
from torch import nn

from fedkd import models
from fedkd.errors import ScenarioError
from fedkd.models import Outputs

SOURCE = '''
import torch
from torch import nn
from fedkd.models import Outputs


class Net(nn.Module):
    """Returns logits of a last linear layer."""

    def __init__(self, num_classes, input_shape, hidden=5):
        super().__init__()
        self.flat = nn.Flatten()
        self.one = nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], hidden)
        self.two = nn.Linear(hidden, num_classes)

    def forward(self, x):
        return self.two(torch.relu(self.one(self.flat(x))))


class Scaled(Net):
    """Its output is not its last linear layer's."""

    def forward(self, x):
        return 2 * super().forward(x)


class Own(Net):
    def forward(self, x):
        features = torch.relu(self.one(self.flat(x)))
        return Outputs(self.two(features), features)


class Normed(Scaled):
    def __init__(self, num_classes, input_shape):
        super().__init__(num_classes, input_shape)
        self.norm = nn.BatchNorm1d(num_classes)

    def forward(self, x):
        return self.norm(super().forward(x))


def bags(num_classes, vocab_size):
    return nn.Sequential(nn.EmbeddingBag(vocab_size, 3), nn.Linear(3, num_classes))


def pair(num_classes, **others):
    net = Net(num_classes, others["input_shape"])
    net.forward = lambda x: (x, x)
    return net


def number(num_classes):
    return 7


def wrong_classes(input_shape):
    return Net(3, input_shape)
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_own_models.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)


def build(name: str, shape=(1, 8, 8), **settings) -> nn.Module:
    return models.build(name, **{"num_classes": 10, "input_shape": shape, "kind": "image"} | settings)


@pytest.mark.parametrize(
    ("name", "width"),
    [("resnet18", 512), ("mobilenet_v3_small", 1024), ("shufflenet_v2_x0_5", 1024), ("mnasnet0_5", 1280)],
)
def test_torchvision_models_are_cut_before_their_last_layer(name, width):
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    model = build(f"torchvision:{name}", (1, 32, 32)).eval()
    out = model(x)
    assert isinstance(out, Outputs) and out.logits.shape == (2, 10) and out.features.shape == (2, width)
    assert torch.equal(model.head(model.body(x.repeat(1, 3, 1, 1))), out.logits)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_torchvision_models_are_seeded_and_leave_the_generator_alone():
    before = torch.random.get_rng_state()
    one, two = (build("torchvision:resnet18", (3, 8, 8), seed=5).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_norms_of_torchvision_models():
    def counts(norm):
        modules = list(build("torchvision:resnet18", (3, 32, 32), norm=norm).modules())
        return sum(isinstance(m, nn.BatchNorm2d) for m in modules), sum(isinstance(m, nn.GroupNorm) for m in modules)

    assert counts("batch") == (20, 0) and counts("group") == (0, 20) and counts("none") == (0, 0)
    with pytest.raises(ScenarioError, match="batch of one"):
        build("torchvision:resnet18", (3, 32, 32), norm="batch")(torch.zeros(1, 3, 32, 32))


def test_vision_transformers_take_the_size_of_the_images():
    options = {"num_layers": 1, "num_heads": 1, "hidden_dim": 8, "mlp_dim": 8}
    with pytest.raises(ScenarioError, match=r"28x28.*patch"):
        build("torchvision:vit_b_16", (3, 28, 28))  # not a multiple of the patch
    assert build("torchvision:vit_b_16", (3, 32, 32))(torch.zeros(2, 3, 32, 32)).features.shape == (2, 768)
    with pytest.raises(ScenarioError) as error:
        build("torchvision:vit_b_16", (3, 32, 32), **options)  # torchvision sets these itself
    assert error.value.key == "models.options"


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("torchvision:resnet19", (3, 32, 32), "did you mean 'resnet18'"),
        ("torchvision:fcn_resnet50", (3, 32, 32), "no classification model"),
        ("torchvision:alexnet", (3, 8, 8), "cannot take images of 8x8"),
        ("torchvision:resnet18", (2, 32, 32), "1 or 3 channels, not 2"),
    ],
)
def test_impossible_torchvision_models_are_refused(name, shape, says):
    with pytest.raises(ScenarioError, match=says) as error:
        build(name, shape)
    assert error.value.key == "models.student"


def test_torchvision_model_without_a_last_linear_layer():
    for channels in (1, 3):
        out = build("torchvision:squeezenet1_1", (channels, 32, 32))(torch.rand(2, channels, 32, 32))
        assert out.logits.shape == (2, 10) and torch.equal(out.features, out.logits)


@pytest.mark.usefixtures("own")
def test_a_module_that_returns_logits_is_wrapped():
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    out = build("my_own_models:Net", hidden=6)(x)
    assert isinstance(out, Outputs) and out.features.shape == (3, 6) and out.logits.shape == (3, 10)
    out = build("my_own_models:Scaled")(x)
    assert torch.equal(out.features, out.logits)
    own = build("my_own_models:Own")
    assert type(own).__name__ == "Own" and own(x).features.shape == (3, 5)
    with pytest.raises(ScenarioError, match="batch of one"):
        build("my_own_models:Normed")(x[:1])


@pytest.mark.usefixtures("own")
def test_a_cut_module_computes_what_the_original_does():
    from my_own_models import Net  # type: ignore[import-not-found]

    with torch.random.fork_rng():
        torch.manual_seed(4)
        original = Net(10, (1, 8, 8))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(build("my_own_models:Net", seed=4)(x).logits, original(x))


@pytest.mark.usefixtures("own")
def test_a_module_for_tokens():
    settings = {"num_classes": 2, "input_shape": (4,), "kind": "tokens", "vocab_size": 9}
    out = models.build("my_own_models:bags", **settings)(torch.ones(2, 4, dtype=torch.int64))
    assert out.logits.shape == (2, 2) and out.features.shape == (2, 3)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("my_own_models:Nett", {}, "no 'Nett'"),
        ("no_such_module_:Net", {}, "no_such_module_"),
        ("my_own_models:number", {}, "returned int"),
        ("my_own_models:pair", {}, "returns tuple"),
        ("my_own_models:wrong_classes", {}, r"returns \(2, 3\), not logits \[N, 10\]"),
        ("my_own_models:Net", {"hiden": 3}, "hiden"),
        ("my_own_models:bags", {}, "fails on inputs of shape"),
        ("math:pi", {}, "not callable"),
    ],
)
def test_modules_that_cannot_be_students_are_refused(name, settings, says):
    with pytest.raises(ScenarioError, match=says) as error:
        build(name, **settings)
    assert error.value.key == "models.student"


@pytest.mark.slow
def test_every_torchvision_family():
    import torchvision.models as zoo

    small = [
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "googlenet",
        "mobilenet_v2",
        "regnet_x_400mf",
        "swin_t",
    ]
    small += [
        "swin_v2_t",
        "vgg11",
        "vgg11_bn",
        "alexnet",
        "vit_b_32",
        "inception_v3",
        "maxvit_t",
        "resnext50_32x4d",
    ]
    for name in small:
        assert name in zoo.list_models()
        size = 224 if name in ("inception_v3", "maxvit_t") else 64
        model = build(f"torchvision:{name}", (3, size, size))
        out = model(torch.zeros(2, 3, size, size))
        assert out.logits.shape == (2, 10) and out.features.shape[1] > 10, name
