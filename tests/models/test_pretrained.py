import pytest
import torch
from safetensors.torch import save_file

from fedkd import models
from fedkd.errors import ScenarioError


def build(name="cnn", classes=10, shape=(1, 8, 8), **settings):
    return models.build(name, num_classes=classes, input_shape=shape, kind="image", **settings)


def saved(model, file):
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    return str(file)


def test_weights_come_back_bit_for_bit(tmp_path):
    source = build("resnet8", norm="batch", seed=1)
    loaded = build("resnet8", norm="batch", seed=2, pretrained=saved(source, tmp_path / "w.safetensors"))
    for key, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_file_below_the_home_folder_is_found(tmp_path, monkeypatch):
    saved(build(seed=1), tmp_path / "w.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))

    assert torch.equal(build(pretrained="~/w.safetensors").head.weight, build(seed=1).head.weight)


def test_a_head_for_other_classes_is_kept_random_only_if_asked(tmp_path):
    source = build(classes=100, seed=1)
    file = saved(source, tmp_path / "w.safetensors")
    with pytest.raises(ScenarioError, match="fresh_head = true") as error:
        build(classes=10, seed=2, pretrained=file)
    assert error.value.key == "models.pretrained"
    assert "head.weight is (100, 64), not (10, 64)" in error.value.problem
    model = build(classes=10, seed=2, pretrained=file, fresh_head=True)
    assert torch.equal(model.head.weight, build(classes=10, seed=2).head.weight)
    body = model.body.state_dict()
    assert all(torch.equal(body[key], tensor) for key, tensor in source.body.state_dict().items())


def test_torchvision_names_are_understood(tmp_path):
    from torchvision.models import resnet18

    with torch.random.fork_rng():
        original = resnet18(num_classes=10).eval()
    file = saved(original, tmp_path / "w.safetensors")
    model = build("torchvision:resnet18", shape=(3, 32, 32), norm="batch", pretrained=file).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x).logits, original(x))


@pytest.mark.parametrize("kind", ["shape", "missing", "extra", "nan", "text", "pickle"])
def test_files_that_do_not_fit_are_refused(tmp_path, kind):
    file = tmp_path / "w.safetensors"
    state = build(seed=1).state_dict()
    first = next(iter(state))
    says = {
        "shape": "does not fit",
        "missing": f"{first} is missing",
        "extra": "other is not in the model",
        "nan": "not finite",
        "text": "not a safetensors file",
        "pickle": "not a safetensors file",
    }[kind]
    if kind == "shape":
        state = build(width=2.0).state_dict()
    elif kind == "missing":
        del state[first]
    elif kind == "extra":
        state["other"] = torch.zeros(1)
    elif kind == "nan":
        state[first] = torch.full_like(state[first], torch.nan)
    if kind == "text":
        file.write_text("not weights")
    elif kind == "pickle":
        torch.save(state, file)
    else:
        save_file(state, file)
    with pytest.raises(ScenarioError, match=says) as error:
        build(pretrained=str(file))
    assert error.value.key == "models.pretrained"
