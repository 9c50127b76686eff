import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from fedkd import models
from fedkd.errors import ScenarioError
from fedkd.losses import cross_entropy
from fedkd.models.base import Classifier, bare_forward, has_hooks

IMAGE_MODELS = [name for name in models.names() if name != "text"]
SHAPES = [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 28, 28), (1, 32, 32), (3, 32, 32)]


def image_model(name: str, shape=(1, 8, 8), **options) -> Classifier:
    model = models.build(name, num_classes=10, input_shape=shape, kind="image", **options)
    assert isinstance(model, Classifier)
    return model


def text_model(**options) -> Classifier:
    model = models.build("text", num_classes=4, input_shape=(6,), kind="tokens", vocab_size=20, **options)
    assert isinstance(model, Classifier)
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_every_image_model_takes_every_shape_and_learns(name, norm):
    for shape in SHAPES:
        model = image_model(name, shape, norm=norm)
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        out = model(x)
        assert out.logits.shape == (2, 10) and out.features.ndim == 2 and out.taps
        assert torch.equal(model.head(out.features), out.logits)
        cross_entropy(out.logits, torch.tensor([1, 2])).backward()
        gradients = [p.grad for p in model.parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_body_and_taps_come_from_the_same_forward(name):
    model = image_model(name, (3, 32, 32)).eval()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = model(x)
    assert torch.equal(model.body(x), out.features)
    # A model can be cut between stages: the rest makes the same of the first tap.
    rest = models.Body(list(model.body.stages)[1:], model.body.neck)
    assert torch.equal(model.head(rest(out.taps[0])), out.logits)


def test_outputs_do_not_depend_on_memory_layout():
    x = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    for name in IMAGE_MODELS:
        model = image_model(name, (3, 28, 28)).eval()
        plain = model(x).logits
        last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last.logits, plain, rtol=1e-4, atol=1e-4)


def test_parameter_counts_of_the_papers():
    # FedAvg's CNN and ResNet-20 are stated in the papers; the others follow from their layers.
    assert parameters(image_model("fedavg_cnn", (1, 28, 28), norm="none")) == 1_663_370
    assert parameters(image_model("mlp", (1, 28, 28))) == 784 * 200 + 200 + 200 * 10 + 10
    assert parameters(image_model("mlp", (1, 28, 28), hidden=[200, 200])) == 199_210
    cnn = (9 * 16 + 16) + (9 * 16 * 32 + 32) + (32 * 7 * 7 * 64 + 64) + 650
    assert parameters(image_model("cnn", (1, 28, 28), norm="none")) == cnn
    # ResNet-20 has 269,722 with padded shortcuts; two projections with their norms are added here.
    projections = 16 * 32 + 64 + 32 * 64 + 128
    assert parameters(image_model("resnet20", (3, 32, 32), norm="batch")) == 269_722 + projections
    vgg = sum(9 * a * b + b for a, b in [(3, 32), (32, 64), (64, 128), (128, 128), (128, 256)])
    vgg += 3 * (9 * 256 * 256 + 256) + 2570
    assert parameters(image_model("vgg9", (3, 32, 32), norm="none")) == vgg


@pytest.mark.parametrize("width", [0.1, 0.3, 0.44, 1.7])
@pytest.mark.parametrize("name", ["cnn", "fedavg_cnn", "resnet8", "vgg9"])
def test_group_norm_fits_every_width(name, width):
    model = image_model(name, (1, 8, 8), width=width)
    out = model(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert out.logits.isfinite().all()


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_group_norm_leaves_small_maps_alive(name):
    model = image_model(name, (1, 8, 8))
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert model(x).features.std(0).max() > 1e-3


@pytest.mark.parametrize("name", models.names())
def test_the_seed_decides_every_bit_and_nothing_else_is_disturbed(name):
    build = text_model if name == "text" else lambda **options: image_model(name, **options)
    before = torch.random.get_rng_state()
    one, again, other = build(seed=2**62), build(seed=2**62), build(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)  # what others draw is of no consequence
    assert same(one, again) and same(one, build(seed=2**62)) and not same(one, other)


@pytest.mark.parametrize("name", [n for n in IMAGE_MODELS if n != "mlp"])
def test_batch_norm_refuses_to_learn_from_one_sample(name):
    model = image_model(name, norm="batch")
    with pytest.raises(ScenarioError, match="batch of one") as error:
        model(torch.zeros(1, 1, 8, 8))
    assert error.value.key == "models.norm"
    assert model.eval()(torch.zeros(1, 1, 8, 8)).logits.shape == (1, 10)
    frozen = model.train()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert frozen(torch.zeros(1, 1, 8, 8)).logits.shape == (1, 10)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_other_norms_learn_from_one_sample(norm):
    for name in IMAGE_MODELS:
        assert image_model(name, norm=norm)(torch.ones(1, 1, 8, 8)).logits.isfinite().all()


def test_norm_option_decides_the_layers():
    kinds = {"group": nn.GroupNorm, "batch": nn.BatchNorm2d}
    for name in ("cnn", "fedavg_cnn", "resnet8", "vgg9"):
        for norm in ("group", "batch", "none"):
            present = {
                kind
                for kind in kinds.values()
                if any(isinstance(m, kind) for m in image_model(name, norm=norm).modules())
            }
            assert present == ({kinds[norm]} if norm in kinds else set())


@pytest.mark.parametrize("norm", ["group", "none"])
def test_pooling_before_relu_changes_no_bits(norm):
    model = image_model("cnn", norm=norm)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def relu_first(x):
        for stage in model.body.stages:
            *layers, pool, relu = stage
            for layer in layers:
                x = layer(x)
            x = pool(relu(x))
        return model.head(model.body.neck(x))

    logits = [model(x).logits, relu_first(x)]
    grads = [torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in logits]
    assert torch.equal(*logits) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_group_norm_stays_float32_under_autocast():
    model = image_model("cnn")
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    seen = []
    for module in norms:
        module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.zeros(2, 1, 8, 8))
    assert seen == [(torch.bfloat16, torch.float32)] * len(norms)
    assert model.double()(torch.zeros(2, 1, 8, 8).double()).logits.dtype == torch.float64


@pytest.mark.parametrize("name", models.names())
def test_a_cohort_is_computed_at_once_as_one_by_one(name):
    if name == "text":
        members = [text_model(seed=s) for s in range(3)]
        x = torch.randint(0, 20, (3, 2, 6), generator=torch.Generator().manual_seed(0))
    else:
        members = [image_model(name, seed=s) for s in range(3)]
        x = torch.randn(3, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[0, 1], [2, 3], [1, 1]])
    params, buffers = stack_module_state(members)  # type: ignore[arg-type]

    def loss(p, b, x, y):
        return cross_entropy(functional_call(members[0], (p, b), (x,)).logits, y)

    gradients = vmap(grad(loss))(params, buffers, x, y)
    for i, member in enumerate(members):
        cross_entropy(member(x[i]).logits, y[i]).backward()
        for key, parameter in member.named_parameters():
            torch.testing.assert_close(gradients[key][i], parameter.grad, rtol=1e-3, atol=1e-5)


def test_text_is_the_mean_of_embeddings_without_padding():
    model = text_model(dim=3)
    table = model.body.stages[0].embedding.weight
    out = model(torch.tensor([[5, 7, 0, 0, 0, 0], [5, 5, 7, 0, 0, 0], [0, 0, 0, 0, 0, 0]]))
    torch.testing.assert_close(out.features[0], (table[5] + table[7]) / 2)
    torch.testing.assert_close(out.features[1], (2 * table[5] + table[7]) / 3)
    assert not out.features[2].any()  # a text of padding alone
    torch.testing.assert_close(out.logits[2], model.head.bias)
    out.logits.sum().backward()
    assert not table.grad[0].any() and table.grad.isfinite().all()
    # Padding counts for nothing even if its embedding is not zero, as in a file made elsewhere.
    with torch.no_grad():
        table[0] = 9.0
    torch.testing.assert_close(model(torch.tensor([[5, 0, 0, 7, 0, 0]])).features[0], (table[5] + table[7]) / 2)


def test_mlp_takes_vectors():
    model = models.build("mlp", num_classes=3, input_shape=(7,), kind="vector", hidden=[5, 4])
    out = model(torch.ones(2, 7))
    assert [t.shape[1] for t in out.taps] == [5, 4] and out.features is out.taps[-1]


def test_a_table_of_options_belongs_to_one_model():
    options = {"mlp": {"hidden": [30]}, "cnn": {"width": 0.5}, "torchvision:resnet18": {"nothing": 1}}
    assert image_model("mlp", **options).head.in_features == 30
    assert image_model("cnn", **options).head.in_features == 32
    assert image_model("resnet8", **options).head.in_features == 64


def test_names_and_descriptions():
    for name in models.names():
        assert models.describe(name) and "\n" not in models.describe(name)
    assert "resnet18" in models.describe("torchvision:resnet18")


@pytest.mark.parametrize(
    ("name", "settings", "key", "says"),
    [
        ("resnet9", {}, "models.student", "did you mean 'resnet8'"),
        ("text", {}, "models.student", "takes tokens, not image"),
        (
            "cnn",
            {"kind": "tokens", "input_shape": (6,), "vocab_size": 9},
            "models.student",
            "for tokens data: text",
        ),
        ("cnn", {"kind": "vector", "input_shape": (6,)}, "models.student", "for vector data: mlp"),
        ("text", {"kind": "tokens", "input_shape": (6,)}, "models.student", "needs a vocabulary"),
        ("cnn", {"input_shape": (1, 7, 9)}, "models.student", "not 7x9"),
        ("cnn", {"widht": 2}, "models.options", "did you mean 'width'"),
        ("cnn", {"width": 0}, "models.options", r"width must be a number in \(0, 64\], is 0"),
        ("mlp", {"hidden": []}, "models.options", "hidden must be a list of 1 or more whole numbers >= 1"),
        ("mlp", {"hidden": [0]}, "models.options", r"hidden must be .*, is \[0\]"),
        ("cnn", {"norm": "layer"}, "models.norm", "group, batch or none"),
        ("cnn", {"pretrained": "no/such.safetensors"}, "models.pretrained", "no file"),
    ],
)
def test_impossible_models_are_refused_with_the_way_out(name, settings, key, says):
    with pytest.raises(ScenarioError, match=says) as error:
        models.build(name, **{"num_classes": 10, "input_shape": (1, 8, 8), "kind": "image"} | settings)
    assert error.value.key == key


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_a_bare_forward_pass_has_the_bits_of_the_model(name, norm):
    ours, theirs = image_model(name, norm=norm), image_model(name, norm=norm)
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    forward = bare_forward(ours)
    assert forward is not ours
    for _ in range(2):
        mine, expected = forward(x), theirs(x)
        assert all(map(torch.equal, (*mine[:2], *mine.taps), (*expected[:2], *expected.taps)))
        for model, out in ((ours, mine), (theirs, expected)):
            (out.logits.sum() + out.features.square().sum()).backward()
            for parameter in model.parameters():
                parameter.data.sub_(parameter.grad, alpha=0.01)
    assert same(ours, theirs)  # running statistics, too


def test_a_bare_forward_pass_follows_the_mode_of_the_model():
    model = image_model("cnn", norm="batch")
    forward, x = bare_forward(model), torch.randn(4, 1, 8, 8)
    model.eval()
    assert torch.equal(forward(x).logits, model(x).logits)
    model.train()
    with pytest.raises(ScenarioError, match="batch of one"):
        forward(x[:1])


def test_hooks_are_seen_wherever_they_are():
    model = image_model("cnn")
    assert not has_hooks(model)
    for register in (
        model.head.register_forward_hook,
        model.body.stages[0].register_forward_pre_hook,
        model.register_full_backward_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        handle = register(lambda *args: None)
        assert has_hooks(model)
        handle.remove()
    assert not has_hooks(model)
