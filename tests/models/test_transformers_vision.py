"""Pretrained encoders from a folder: small ones, made here and saved as the library saves them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tests.conftest import blobs

from privet.errors import InputError, MissingExtraError
from privet.learning import Job, Learner, Runtime
from privet.models import SavedModel, create_model, family, load_model, save_model
from privet.protection import UGE
from privet.protection.feature_space import train_space

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
EYE: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 8}


def folder_of(kind: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a small encoder, whose preprocessing says what its channels' means are."""
    torch.manual_seed(0)
    if kind == "vit":
        model: Any = transformers.ViTModel(transformers.ViTConfig(**EYE))
    elif kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**EYE))
    elif kind == "resnet":
        few = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
        model = transformers.ResNetModel(transformers.ResNetConfig(**few))
    else:
        tongue = {**SMALL, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=tongue, vision_config=EYE, projection_dim=12)
        )
    model.to(dtype).save_pretrained(path)
    told = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    (path / "preprocessor_config.json").write_text(json.dumps(told))
    return path


def test_a_record_names_an_encoder_by_what_it_computes_with_not_by_its_place(tmp_path: Path) -> None:
    folder = folder_of("vit", tmp_path / "here")
    shutil.copytree(folder, moved := tmp_path / "elsewhere")
    (moved / "notes.md").write_text("of no effect")

    def recorded(place: Path) -> Any:
        encoders = (f"transformers:{place}", f"simclr:transformers:{place}")
        name, without_labels = UGE(key=bytes(range(32)), encoders=encoders).settings()["encoders"]
        assert str(place) not in name and without_labels == f"simclr:{name}"
        return name

    assert recorded(folder) == recorded(moved)
    for file in ("preprocessor_config.json", "model.safetensors"):
        before = recorded(moved)
        (moved / file).write_bytes((moved / file).read_bytes() + b" ")
        assert recorded(moved) != before


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_its_features_are_the_library_s(kind: str, tmp_path: Path) -> None:
    folder = folder_of(kind, tmp_path)
    model = create_model(f"transformers:{folder}", classes=3, size=(16, 16)).eval()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    channels = (torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25]))
    mean, std = (one.view(1, 3, 1, 1) for one in channels)
    bare = transformers.AutoModel.from_pretrained(folder).eval()
    found = (bare.get_image_features if kind == "clip" else bare)(pixel_values=(x - mean) / std)
    expected = found.pooler_output
    torch.testing.assert_close(model.features(x), expected)
    assert model(x).shape == (2, 3) and expected.shape[1] == model.head.in_features
    larger = F.interpolate(x, (32, 32), mode="bicubic").clamp(0, 1)
    assert model(larger).shape == (2, 3)
    larger.requires_grad_()
    model(larger).sum().backward()
    assert larger.grad is not None and bool(larger.grad.abs().sum() > 0)
    assert family(f"transformers:{folder}") == "transformers"


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_16_bits_are_learned_in_32(dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    folder = folder_of("vit", tmp_path, dtype)
    model = create_model(f"transformers:{folder}", classes=3, size=(16, 16))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    with Runtime(device=torch.device("cpu"), precision=precision).autocast():
        assert bool(model(torch.rand(2, 3, 16, 16)).isfinite().all())


@pytest.mark.parametrize(
    ("kind", "some"), [("vit", False), ("resnet", False), ("dinov2", True), ("clip", True)]
)
def test_weights_without_a_gradient_are_frozen_and_kept(kind: str, some: bool, tmp_path: Path) -> None:
    """Averaging gradients over several processes waits for every weight that is not frozen."""
    folder = folder_of(kind, tmp_path / kind)
    model = create_model(f"transformers:{folder}", classes=3, size=(16, 16)).train()
    state = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    expected = transformers.AutoModel.from_pretrained(folder).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)  # running statistics too
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in model.parameters())
    assert any(not weight.requires_grad for weight in model.parameters()) == some
    about = SavedModel(architecture=f"transformers:{folder}", class_names=("a", "b", "c"), size=(16, 16))
    save_model(tmp_path / "m", model, about)
    again = load_model(tmp_path / "m")[0]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_space_of_its_features_leaves_it_as_it_is(runtime: Runtime, tmp_path: Path) -> None:
    folder = folder_of("vit", tmp_path)
    images = blobs(60, size=(16, 16))
    learner = Learner(architecture=f"transformers:{folder}", epochs=3)
    space = train_space(images, learner, number=0, job=Job(runtime=runtime))
    before = create_model(f"transformers:{folder}", classes=3, size=(16, 16))
    for name, value in before.encoder.state_dict().items():
        assert torch.equal(value, space.model.encoder.state_dict()[name])
    x = images.pixels.float() / 255
    right = (space.model(x).argmax(1) == images.labels).float().mean()
    assert float(right) > 0.8  # a linear probe tells blobs of three colours apart
    assert space(x).mean(0).abs().max() < 1e-2


def test_folders_that_hold_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"holds no model of transformers: expected config\.json"):
        create_model(f"transformers:{tmp_path}", classes=2, size=(16, 16))
    folder = folder_of("vit", tmp_path / "vit")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="holds no vision model that transformers can load"):
        create_model(f"transformers:{folder}", classes=2, size=(16, 16))
    weights.write_bytes(whole)
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(InputError, match="holds no vision model that transformers can load"):
        create_model(f"transformers:{folder}", classes=2, size=(16, 16))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'privet\[transformers\]'"):
        create_model(f"transformers:{folder}", classes=2, size=(16, 16))
