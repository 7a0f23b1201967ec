from __future__ import annotations

import json
import math
import sys
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from privet import models
from privet.errors import InputError, MissingExtraError, UsageError
from privet.models import (
    ARCHITECTURES,
    SavedModel,
    create_model,
    family,
    load_backbone,
    load_model,
    save_model,
)
from privet.models.blocks import conv_bn
from privet.models.projection import last_layer
from privet.models.resnet import Projection

SMALL = (
    *("resnet8", "resnet10-w8", "resnet18-w8", "resnet50-w4", "resnet18-imagenet-w8"),
    *("vgg11-w8", "vgg16-w4", "densenet22", "mobilenetv2-w8", "vit-w32", "cnn"),
    *("lenet", "lenet-sigmoid", "lenet-strided-sigmoid", "resnet8-sigmoid", "resnet18-sigmoid-w8"),
)


@pytest.mark.parametrize("size", [(32, 32), (16, 24)])
@pytest.mark.parametrize("name", SMALL)
def test_logits_for_each_image(name: str, size: tuple[int, int]) -> None:
    model = create_model(name, classes=7, size=size)
    x = torch.rand(3, 3, *size)
    for network in (model.train(), model.eval()):
        logits = network(x)
        assert logits.shape == (3, 7)
        assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("name", ["vgg11-w8", "densenet22", "densenet121-w4", "vit-w32"])
@pytest.mark.parametrize("size", [(7, 9), (3, 5), (1, 1)])
def test_small_images_are_no_exception(name: str, size: tuple[int, int]) -> None:
    assert create_model(name, classes=2, size=size).eval()(torch.rand(2, 3, *size)).shape == (2, 2)


@pytest.mark.parametrize("size", [(39, 39), (39, 17), (8, 24), (32, 32)])
def test_a_vit_sees_every_pixel(size: tuple[int, int]) -> None:
    x = torch.rand(1, 3, *size, requires_grad=True)
    create_model("vit-w32", classes=2, size=size)(x)[:, 0].sum().backward()
    assert x.grad is not None and bool((x.grad != 0).all())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_built(name: str) -> None:
    assert (
        sum(weight.numel() for weight in create_model(name, classes=10, size=(32, 32)).parameters()) > 15_000
    )


def test_published_sizes() -> None:
    """Parameter counts that others give for these networks, with 10 classes at 32 px (1,000 at 224)."""

    def count(name: str, classes: int = 10, size: tuple[int, int] = (32, 32)) -> int:
        return sum(weight.numel() for weight in create_model(name, classes=classes, size=size).parameters())

    assert count("resnet18") == count("resnet18-sigmoid") == 11_173_962
    assert count("lenet-sigmoid") == 62_006
    assert count("lenet-sigmoid", 100) == 69_656
    assert count("lenet-strided-sigmoid", 100) == 85_036
    assert count("resnet18-imagenet", 1000, (224, 224)) == 11_689_512
    assert count("resnet50-imagenet", 1000, (224, 224)) == 25_557_032
    assert count("densenet121", 1000, (224, 224)) == 7_978_856
    assert count("mobilenetv2", 1000, (224, 224)) == 3_504_872


def unfolded(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tensor:
    return bn(conv(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_folding_is_exact_to_rounding(bias: bool, groups: int) -> None:
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups, bias=bias).double()
    bn = nn.BatchNorm2d(8).double()
    x = torch.randn(5, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        bn(conv(torch.randn_like(x) * 3 + 1))
    nn.init.uniform_(bn.weight, -1, 2)
    nn.init.uniform_(bn.bias, -1, 1)
    torch.testing.assert_close(conv_bn(x, conv, bn), bn(conv(x)))  # training: statistics of the batch
    bn.eval()
    folded, plain = conv_bn(x, conv, bn), bn(conv(x))
    torch.testing.assert_close(folded, plain)
    g = torch.randn_like(plain)
    for one, other in zip(
        torch.autograd.grad((folded * g).sum(), [x, conv.weight, bn.weight]),
        torch.autograd.grad((plain * g).sum(), [x, conv.weight, bn.weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_seed_decides_the_weights_and_leaves_torch_s_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = create_model("resnet8", classes=2, size=(8, 8), seed=1)
    assert torch.equal(torch.rand(3), expected)
    second, other = (create_model("resnet8", classes=2, size=(8, 8), seed=seed) for seed in (1, 2))
    weights = [next(model.parameters()) for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", ["resnet9", "resnet8-w0", "resnet8-w", "", "timm", "resnet8 "])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match="Unknown architecture .* Known: resnet8, resnet10"):
        create_model(name, classes=2, size=(8, 8))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit-w100", "its 3 heads share evenly, got 100; take a multiple of 32"),
        ("simclr:simclr:resnet8", "Expected simclr: once before a network's name"),
        ("simclr:" * 10_000 + "resnet8", "Expected simclr: once before a network's name"),
    ],
    ids=["vit", "two heads", "many heads"],
)
def test_names_that_cannot_be_built_are_refused(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        create_model(name, classes=2, size=(8, 8))


def test_families() -> None:
    assert [family(name) for name in ("resnet18-imagenet", "resnet8-w16", "vgg11", "timm:convnext_tiny")] == [
        "resnet",
        "resnet",
        "vgg",
        "convnext",
    ]


def test_timm_is_asked_for_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        MissingExtraError, match=r"timm:tiny needs an optional package. .* pip install 'privet\[timm\]'"
    ):
        create_model("timm:tiny", classes=2, size=(8, 8))


def test_timm_models_are_used_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with timm's interface: timm itself needs a torchvision that fits the torch build."""

    class Tiny(nn.Module):
        default_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 0.5)}

        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.num_classes = num_classes

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))[:, :1].expand(-1, self.num_classes)

    timm = types.ModuleType("timm")
    timm.is_model = lambda name: name == "tiny"  # type: ignore[attr-defined]
    timm.list_models = lambda pattern: ["tiny"]  # type: ignore[attr-defined]

    def make(name: str, num_classes: int, img_size: object = None) -> Tiny:
        if img_size is not None:
            raise TypeError("img_size")
        return Tiny(num_classes)

    timm.create_model = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    model = create_model("timm:tiny", classes=4, size=(8, 8))
    torch.testing.assert_close(model(torch.full((1, 3, 8, 8), 0.5)), torch.full((1, 4), 0.4))
    with pytest.raises(UsageError, match="timm has no model 'huge'; it has tiny"):
        create_model("timm:huge", classes=4, size=(8, 8))


class Distilled(nn.Module):
    """Two heads, as DeiT's distilled form has them in timm, or one that is not registered last."""

    default_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}

    def __init__(self, heads: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)
        self.head_dist = nn.Linear(3, num_classes if heads == 2 else 3)
        self.heads = heads

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        return self.head if self.heads == 1 else (self.head, self.head_dist)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        if self.heads == 1:
            return self.head(self.head_dist(x))  # type: ignore[no-any-return]
        return (self.head(x) + self.head_dist(x)) / 2  # type: ignore[no-any-return]


@pytest.mark.parametrize("heads", [1, 2])
def test_last_layers_of_timm_s_networks(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = types.ModuleType("timm")
    timm.is_model = lambda name: True  # type: ignore[attr-defined]
    timm.create_model = lambda name, num_classes, img_size: Distilled(heads, num_classes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    model = create_model("timm:deit", classes=4, size=(8, 8))
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 4)
    if heads == 1:
        assert last_layer(model) == ("network.head", model.network.head)
        model = create_model("simclr:timm:deit", classes=4, size=(8, 8))
        assert model(torch.rand(2, 3, 8, 8)).shape == (2, 128)
        assert last_layer(model) == ("network.head", model.network.head)
        return
    for look in (lambda: last_layer(model), lambda: create_model("simclr:timm:deit", classes=4, size=(8, 8))):
        with pytest.raises(UsageError, match="or with several side by side"):
            look()


ABOUT = SavedModel(architecture="resnet8-w4", class_names=("a", "é"), size=(8, 8), notes={"seed": 3})


def saved(path: Path) -> nn.Module:
    model = create_model("resnet8-w4", classes=2, size=(8, 8), seed=9)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.running_mean, 0.3)  # type: ignore[arg-type]
    save_model(path, model, ABOUT)
    return model


def test_saved_models_come_back(tmp_path: Path) -> None:
    model = saved(tmp_path / "m.safetensors")
    again, about = load_model(tmp_path / "m.safetensors")
    assert about == ABOUT
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(again(x), model.eval()(x))


@pytest.mark.parametrize("name", [*SMALL, "simclr:cnn-w4"])
def test_every_kind_of_network_comes_back(name: str, tmp_path: Path) -> None:
    model = create_model(name, classes=2, size=(17, 16), seed=9).eval()
    save_model(tmp_path / "m", model, SavedModel(architecture=name, class_names=("a", "b"), size=(17, 16)))
    x = torch.rand(2, 3, 17, 16)
    assert torch.equal(load_model(tmp_path / "m")[0](x), model(x))


def test_saving_gives_the_same_bytes_each_time(tmp_path: Path) -> None:
    assert len({(saved(tmp_path / str(n)), (tmp_path / str(n)).read_bytes())[1] for n in range(5)}) == 1


@pytest.mark.parametrize("length", [0, 7, 200, -4])
def test_truncated_weights_are_one_error(tmp_path: Path, length: int) -> None:
    saved(tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[:length])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        load_model(tmp_path / "m.safetensors")


def test_shapes_that_torch_cannot_hold_are_one_error(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "m").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        load_model(tmp_path / "m")


def rewrite(path: Path, change: dict[str, object] | None = None, drop: str = "") -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != drop}  # noqa: SIM118
        about = json.loads(file.metadata()["privet-model-1"])
    about.update(change or {})
    safetensors.torch.save_file(tensors, path, {"privet-model-1": json.dumps(about)})


def test_weights_that_do_not_fit_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    saved(path)
    rewrite(path, drop="fc.bias")
    with pytest.raises(InputError, match="lacks 1 tensors of resnet8-w4: fc.bias"):
        load_model(path)
    saved(path)
    rewrite(path, {"size": "large"})
    with pytest.raises(InputError, match="has a broken description of its network"):
        load_model(path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="does not say of which network"):
        load_model(path)
    with pytest.raises(InputError, match="There is no weights file"):
        load_model(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": [math.inf, 8]}, "broken description .* infinity"),
        ({"size": [math.nan, 8]}, "broken description"),
        ({"size": [-8, 8]}, r"sides between 1 and 16384, got 2 and \(-8, 8\)"),
        ({"architecture": "lenet", "size": [10**6, 10**6]}, "sides between 1 and 16384"),
        ({"architecture": "vit-w32", "size": [8, 10**9]}, "sides between 1 and 16384"),
        ({"class_names": []}, "at least 1 class"),
        ({"architecture": "vit-w100"}, "a network that cannot be built: Expected a width of vit"),
        ({"architecture": "simclr:" * 9999}, "a network that cannot be built: Expected simclr: once"),
        ({"architecture": "lenet"}, "a network that cannot be built: lenet needs images of at least 16 px"),
        ({"architecture": "resnet" * 999}, "a network that cannot be built: Unknown architecture .{99}"),
        ({"architecture": "transformers:" + 999 * "long"}, "holds no vision model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_descriptions_of_no_network_are_one_error(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    saved(tmp_path / "m")
    rewrite(tmp_path / "m", change)
    with pytest.raises(InputError, match=words):
        load_model(tmp_path / "m")


def test_deep_descriptions_are_one_error(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "m", {"privet-model-1": "[" * 100_000})
    with pytest.raises(InputError, match="broken description of its network: RecursionError"):
        load_model(tmp_path / "m")


def test_no_memory_is_taken_for_what_a_file_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nn.Module] = []

    def make(*given: Any, **named: Any) -> nn.Module:
        made.append(create_model(*given, **named))
        return made[-1]

    saved(tmp_path / "m")
    rewrite(tmp_path / "m", {"architecture": "resnet8-w64"})
    monkeypatch.setattr(models, "create_model", make)
    with pytest.raises(InputError, match=r"lacks \d+ tensors of resnet8-w64"):
        load_model(tmp_path / "m")
    assert made and all(weight.is_meta for model in made for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_kinds_of_numbers_that_networks_do_not_have_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    model = saved(tmp_path / "m")
    tensors = {name.removeprefix("network."): value for name, value in model.state_dict().items()}
    tensors["fc.bias"] = tensors["fc.bias"].to(dtype)
    safetensors.torch.save_file(tensors, tmp_path / "m", {"privet-model-1": json.dumps(asdict(ABOUT))})
    for load in (load_model, lambda path: load_backbone(path, model)):
        with pytest.raises(InputError, match=rf"holds {dtype} in fc.bias; expected floats of 16 to 64 bits"):
            load(tmp_path / "m")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
HEADS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(
            ["F32", "F64", "F16", "F4", "F6_E2M3", "F8_E8M0", "C64", "U64", "BOOL", "X"]
        ),
        "shape": st.lists(st.integers(0, 2**64), max_size=3) | st.just([1] * 70),
    }
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "m"
    saved(path)
    return path


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files_end_in_one_error(whole: Path, data: st.DataObject) -> None:
    """A byte lost or changed, or another value anywhere in the header: a network comes back, or one error."""
    before = whole.read_bytes()
    length = int.from_bytes(before[:8], "little")
    kind = data.draw(st.sampled_from(["cut", "byte", "about", "tensor"]))
    if kind in ("cut", "byte"):
        place = data.draw(st.integers(0, length + 99))
        rest = b"" if kind == "cut" else data.draw(st.binary(max_size=4)) + before[place + 1 :]
        damaged = before[:place] + rest
    else:
        header = json.loads(before[8 : 8 + length])
        if kind == "about":
            about = asdict(ABOUT)
            about[data.draw(st.sampled_from(sorted(about)))] = data.draw(JSON)
            header["__metadata__"]["privet-model-1"] = json.dumps(about)
        else:
            header["fc.bias"] |= data.draw(HEADS)
        text = json.dumps(header).encode()
        damaged = len(text).to_bytes(8, "little") + text + before[8 + length :]
    path = whole.with_name("damaged")
    path.write_bytes(damaged)
    try:
        load_model(path)
    except InputError as error:
        assert str(path) in str(error)


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    model = create_model("resnet8-w4", classes=2, size=(8, 8))
    with torch.no_grad():
        next(model.parameters())[0] = float("nan")
    save_model(tmp_path / "m", model, ABOUT)
    with pytest.raises(InputError, match="holds NaN or infinity in conv1.weight"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("inputs", [3, 4, 6, 8, 12, 16])
def test_shortcuts_and_their_gradients_are_those_of_a_strided_convolution(inputs: int) -> None:
    shortcut = Projection(inputs, 2 * inputs, 2).eval()
    shortcut.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(8, inputs, 64, 64).to(memory_format=torch.channels_last)
    (weight,) = (value for name, value in shortcut.named_parameters() if name == "0.weight")
    y = shortcut(x)
    exact = weight.detach().double().requires_grad_()
    strided = F.conv2d(x.double(), exact, stride=2) / (1 + 1e-5) ** 0.5  # batch norm begins with variance 1
    torch.testing.assert_close(y.double(), strided, rtol=1e-5, atol=1e-5)
    (slope,) = torch.autograd.grad(y.square().sum(), weight)
    (expected,) = torch.autograd.grad(strided.square().sum(), exact)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=1e-4)


def test_fine_tuning_keeps_the_head_that_does_not_fit(tmp_path: Path) -> None:
    source = create_model("resnet18-imagenet-w8", classes=1000, size=(64, 64), seed=1)
    # a file with torchvision's names, as others publish them
    tensors = {name.removeprefix("network."): value for name, value in source.state_dict().items()}
    assert "layer2.0.downsample.0.weight" in tensors
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    model = create_model("resnet18-imagenet-w8", classes=5, size=(64, 64), seed=2)
    assert load_backbone(tmp_path / "w.safetensors", model) == ["fc.weight", "fc.bias"]
    state = model.state_dict()
    assert torch.equal(state["network.layer4.1.conv2.weight"], tensors["layer4.1.conv2.weight"])
    other = create_model("vgg11-w8", classes=5, size=(64, 64))
    with pytest.raises(
        InputError, match="does not fit this architecture: .* Expected weights of the same network"
    ):
        load_backbone(tmp_path / "w.safetensors", other)
