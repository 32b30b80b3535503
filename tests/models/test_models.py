"""The models as timm citizens, their files, and where fine-tuning starts."""

import json
import resource
import socket
import time

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy import stats
from support.models import tiny_mtm
from timm.optim import param_groups_layer_decay
from torch import nn

from seitpp.models import (
    MTM,
    ModelError,
    classifier_from,
    load_classifier,
    load_mtm,
    load_pretrained,
    load_pretrained_tokenadapt,
    pixel_classifier_from,
    save_classifier,
)
from seitpp.models.weights.pretrained import save_pretrained

SEIT_VITS = [f"seit_vit_{size}" for size in ("nano", "tiny", "small", "base")]
MTM_VITS = [f"mtm_vit_{size}" for size in ("nano", "tiny", "small", "base")]
RESNETS = ["seit_resnet18", "seit_resnet50", "seit_resnet18_reduced"]
NAMES = SEIT_VITS + MTM_VITS + RESNETS
SMALL = ["seit_vit_nano", "mtm_vit_nano", "seit_resnet18"]


def make(name: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    codes = {"num_codes": 64} if name.startswith("mtm") else {}
    return timm.create_model(name, **{"img_size": 8, "in_chans": 16, "num_classes": 10, **codes, **changes})


def batch(name: str, height: int = 8, width: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if name.startswith("mtm"):
        return torch.randint(64, (2, 1, height, width), generator=generator)
    return torch.randn(2, 16, height, width, generator=generator)


def nano_mtm(**changes) -> MTM:
    torch.manual_seed(0)
    return tiny_mtm(code_dim=16, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_timm_citizens(name: str) -> None:
    model, inputs = make(name).eval(), batch(name)
    with torch.no_grad():
        assert model(inputs).shape == (2, 10)
        features = model.forward_features(inputs)
        maps = model.forward_intermediates(inputs, intermediates_only=True, norm=False)
        if name in RESNETS:
            unit = 1 if name.endswith("reduced") else 8  # of a reduction: a value of the input, or a pixel
            reductions = [info["reduction"] for info in model.feature_info]
            assert [m.shape[-1] for m in maps] == [8 * unit // reduction for reduction in reductions]
            assert features.shape == maps[-1].shape and features.shape[1] == model.num_features
        else:
            assert features.shape == (2, 17, model.embed_dim)
            assert maps[-1].shape == (2, model.embed_dim, 4, 4)
        model.reset_classifier(3)
        assert model(inputs).shape == (2, 3)
        model.reset_classifier(0)
        assert model(inputs).shape == (2, model.num_features)


@pytest.mark.parametrize("name", SMALL)
def test_other_sizes(name: str) -> None:
    model = make(name).eval()
    if hasattr(model, "set_input_size"):
        model.set_input_size((12, 16))
    assert model(batch(name, 12, 16)).shape == (2, 10)


def test_the_window_can_differ_from_image_to_image() -> None:
    model = make("seit_vit_nano", dynamic_img_size=True).eval()
    square = make("seit_vit_nano").eval()
    square.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(batch("seit")), square(batch("seit")))
    assert model(batch("seit", 12, 10)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("seit_vit_nano", stem) for stem in ("linear", "conv2", "conv4")] + [(n, None) for n in SMALL[1:]],
)
def test_every_parameter_gets_a_gradient(name: str, stem: str | None) -> None:
    model = make(name, stem=stem)
    for module in model.modules():
        # timm begins with residual branches that are shut: behind a zero scale nothing gets a gradient.
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.ones_(module.weight)
    F.cross_entropy(model(batch(name)), torch.tensor([3, 7])).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert [n for n, g in gradients.items() if g is None or not g.any() or not g.isfinite().all()] == []


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_spares_the_stem_most(name: str) -> None:
    with torch.device("meta"):
        model = make(name)
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    by_name = {n: scales[id(p)] for n, p in model.named_parameters()}
    stem = [n for n in by_name if n.startswith(("patch_embed.", "cls_token", "pos_embed", "conv1.", "bn1."))]
    head = [n for n in by_name if n.startswith(("head.", "fc."))]
    assert len(stem) >= 3 and len(head) == 2
    assert {by_name[n] for n in stem} == {min(by_name.values())}
    assert {by_name[n] for n in head} == {1.0}
    blocks = len(model.blocks) if hasattr(model, "blocks") else {"18": 8, "50": 16}[name[11:13]]
    assert min(by_name.values()) == pytest.approx(0.5 ** (blocks + 1), rel=1e-6)
    if name in MTM_VITS:
        assert by_name["patch_embed.token_emb.weight"] == min(by_name.values())


@pytest.mark.parametrize(
    ("name", "theirs", "added"),
    [
        ("seit_vit_base", "vit_base_patch16_224", set()),
        ("mtm_vit_base", "vit_base_patch16_224", {"token_emb.weight", "token_norm.weight", "token_norm.bias"}),
        ("seit_resnet18", "resnet18", set()),
        ("seit_resnet50", "resnet50", set()),
    ],
)
def test_names_are_those_of_timm(name: str, theirs: str, added: set[str]) -> None:
    with torch.device("meta"):
        ours, timms = timm.create_model(name), timm.create_model(theirs, global_pool="avg")
    extra = {f"patch_embed.{part}" for part in added}
    assert set(ours.state_dict()) == set(timms.state_dict()) | extra
    stem = {"conv1.weight", "patch_embed.proj.weight"}
    assert {n for n, t in timms.state_dict().items() if ours.state_dict()[n].shape != t.shape} == stem & set(
        timms.state_dict()
    )


@pytest.mark.parametrize(("name", "millions"), [("seit_vit_base", 86.37), ("seit_vit_small", 21.95)])
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert model.pos_embed.shape[1] == 197 and model.patch_embed.img_size == (28, 28)
    assert model.fc_norm.eps == model.blocks[0].norm1.eps == 1e-6 and isinstance(model.norm, nn.Identity)
    assert timm.create_model("seit_vit_nano", stem="linear").patch_embed.img_size == (14, 14)


def test_the_stems_are_the_published_layers() -> None:
    maps = torch.randn(2, 16, 8, 8)
    for stem, layer in {"linear": (1, 1, 0), "conv2": (2, 2, 0), "conv4": (4, 2, 1)}.items():
        embed = make("seit_vit_nano", stem=stem).patch_embed
        expected = F.conv2d(maps, embed.proj.weight, embed.proj.bias, stride=layer[1], padding=layer[2])
        assert embed.proj.weight.shape == (96, 16, layer[0], layer[0])
        torch.testing.assert_close(embed(maps), expected.flatten(2).transpose(1, 2))
        assert embed.num_patches == expected[0, 0].numel()
    resnet = timm.create_model("seit_resnet18").eval()
    seen = []
    resnet.layer1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    resnet(torch.randn(1, 32, 28, 28))
    assert seen == [(1, 64, 56, 56)]


def test_the_reduced_resnet_is_that_of_gem() -> None:
    """1,109,240 weights for 3 channels and 100 classes; inputs keep their size until the second stage."""
    model, seen = timm.create_model("seit_resnet18_reduced", in_chans=3, num_classes=100).eval(), []
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_109_240
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    assert model(torch.randn(1, 3, 32, 40)).shape == (1, 100)
    assert seen == [(20, 32, 40), (40, 16, 20), (80, 8, 10), (160, 4, 5)]
    assert timm.create_model("seit_resnet18_reduced", num_classes=0).eval()(torch.zeros(1, 32, 8, 8)).shape == (
        1,
        160,
    )


def test_the_head_sees_the_mean_of_the_patches_without_cls() -> None:
    model = make("seit_vit_nano").eval()
    features = model.forward_features(batch("seit"))
    mean = F.layer_norm(features[:, 1:].mean(1), (96,), model.fc_norm.weight, model.fc_norm.bias, 1e-6)
    torch.testing.assert_close(model(batch("seit")), F.linear(mean, model.head.weight, model.head.bias))


def test_unknown_stems_are_refused() -> None:
    with pytest.raises(ModelError, match="'deconv' of a ViT: expected one of linear, conv2, conv4"):
        make("seit_vit_nano", stem="deconv")
    with pytest.raises(ModelError, match="'conv4' of a ResNet: expected deconv"):
        make("seit_resnet18", stem="conv4")


# Files


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("seit_vit_nano", {"stem": "linear", "drop_path_rate": 0.3}),
        ("mtm_vit_nano", {"token_drop_rate": 0.3}),
        ("seit_resnet18", {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "in_chans": 3, "global_pool": "avg", "depth": 2}),
    ],
)
def test_save_and_load(tmp_path, name: str, changes: dict) -> None:
    path = tmp_path / "model.safetensors"
    model = make(name, **changes)
    model.reset_classifier(3)  # the file tells of the model as it is, not as it was made
    codebook = None if name.startswith("vit") else "abc"
    save_classifier(path, model, codebook, class_names=["one", "two", "three"])
    saved = load_classifier(path)
    inputs = torch.randn(2, 3, 32, 32) if name.startswith("vit") else batch(name)
    assert torch.equal(saved.model(inputs), model.eval()(inputs))
    assert (saved.codebook, saved.class_names, saved.spec.name) == (codebook, ["one", "two", "three"], name)
    assert not saved.model.training


def test_a_model_with_other_settings_is_not_saved(tmp_path) -> None:
    with pytest.raises(ModelError, match="builds other tensors than this model's"):
        save_classifier(tmp_path / "m", make("seit_vit_nano", mlp_ratio=2.0), "abc", class_names=None)
    with pytest.raises(ModelError, match="got a Linear, expected a ViT or ResNet"):
        save_classifier(tmp_path / "m", nn.Linear(2, 2), "abc", class_names=None)
    assert list(tmp_path.iterdir()) == []


def test_bad_files_are_refused(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ModelError, match=rf"no model file at {path}"):
        load_classifier(path)
    save_classifier(path, make("seit_vit_nano"), "abc", class_names=None)
    assert load_classifier(path).class_names is None
    with pytest.raises(ModelError, match=rf"{path} is of another kind: expected .* pre-training run"):
        load_mtm(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=rf"{path} cannot be read"):
        load_classifier(path)
    save_pretrained(path, nano_mtm(), codebook="abc")
    with pytest.raises(ModelError, match=rf"{path} is of another kind: expected a classifier"):
        load_classifier(path)
    spec = {"name": "hf-hub:somebody/model", "arguments": {}}
    header = json.dumps({"spec": spec, "codebook": None, "class_names": None})
    save_file({"x": torch.zeros(1)}, path, metadata={"classifier": header})
    with pytest.raises(ModelError, match="hf-hub:somebody/model, expected a model of timm"):
        load_classifier(path)


def classifier_header(**changes) -> dict:
    arguments = {
        "img_size": [14, 14],
        "in_chans": 4,
        "embed_dim": 96,
        "depth": 3,
        "num_heads": 3,
        "stem": "linear",
    }
    arguments |= changes.pop("arguments", {})
    spec = {"name": "seit_vit_nano", "arguments": {**arguments, "num_classes": 10, "global_pool": "avg"}}
    return {"spec": spec, "codebook": None, "class_names": None, "window": None, **changes}


def mtm_header(**settings) -> dict:
    return {"settings": {"encoder": "mtm_vit_nano", **settings}, "codebook": "abc"}


@pytest.mark.parametrize(
    ("kind", "header", "message"),
    [
        ("classifier", classifier_header(arguments={"pretrained": True}), "header has pretrained True"),
        (
            "classifier",
            classifier_header(arguments={"checkpoint_path": "/etc/passwd"}),
            "header has checkpoint_path",
        ),
        (
            "classifier",
            classifier_header(arguments={"pretrained_cfg_overlay": {"url": "x"}}),
            "pretrained_cfg_over",
        ),
        (
            "classifier",
            classifier_header(arguments={"depth": 10**6}),
            "has 1,000,000 blocks, but it has 1 tensors",
        ),
        ("classifier", classifier_header(arguments={"depth": True}), "header has depth True"),
        ("classifier", classifier_header(arguments={"embed_dim": 10**12}), "header has embed_dim 1000000000000"),
        ("classifier", classifier_header(arguments={"embed_dim": 97, "depth": 1}), "header describes no model"),
        (
            "classifier",
            classifier_header(arguments={"img_size": [10**6, 10**6], "depth": 1}),
            "expected .* by its",
        ),
        ("classifier", classifier_header(arguments={"in_chans": 10**6, "depth": 1}), "expected .* by its header"),
        ("classifier", classifier_header(spec=7), "header has spec 7"),
        ("classifier", classifier_header(spec={"name": "seit_vit_nano"}), "header lacks arguments"),
        ("classifier", classifier_header(class_names=[1]), r"header has class_names \[1\]"),
        ("classifier", [], r"header has \[\] for an object"),
        ("classifier", {}, "header lacks spec"),
        ("mtm", mtm_header(encoder="hf-hub:somebody/model"), "header has encoder 'hf-hub:somebody/model'"),
        ("mtm", mtm_header(encoder="vit_base_patch16_224"), "header has encoder 'vit_base_patch16_224'"),
        ("mtm", mtm_header(encoder_size={"pretrained": 1}), "header has pretrained 1"),
        ("mtm", mtm_header(encoder_size={"depth": 10**6}), "1,000,000 blocks"),
        ("mtm", mtm_header(decoder_depth=10**6), "1,000,000 blocks"),
        ("mtm", mtm_header(grid=[10**5, 10**5], encoder_size={"depth": 1}, decoder_depth=1), "expected .* by its"),
        ("mtm", mtm_header(dropout=float("nan")), "header has dropout nan"),
        ("tokenadapt", {"settings": {"grid": [10**5, 10**5]}, "codebook": None}, "expected .* by its header"),
        ("tokenadapt", {"settings": {"width": 10**6, "heads": 3}, "codebook": None}, "header"),
    ],
)
def test_headers_of_strangers_are_refused_before_anything_is_built(
    tmp_path, monkeypatch, kind: str, header: object, message: str
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket, "socket", forbidden)
    path, began, before = tmp_path / "m.safetensors", time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    save_file({"x": torch.zeros(1)}, path, metadata={kind: json.dumps(header)})
    load = load_pretrained_tokenadapt if kind == "tokenadapt" else load_pretrained
    with pytest.raises(ModelError, match=message) as refused:
        load(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value) and len(str(refused.value)) < 500
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert time.monotonic() - began < 2 and (after.ru_maxrss - before.ru_maxrss) < 200 * 2**10
    assert [*tmp_path.iterdir()] == [path]


def test_a_checkpoint_of_more_values_than_bytes_is_refused(tmp_path) -> None:
    path = tmp_path / "m.pth"
    for tensor in (torch.zeros(1).expand(10**10), torch.eye(3).to_sparse()):
        torch.save({"model": {"head.bias": tensor}}, path)
        with pytest.raises(ModelError, match="not stored as such"):
            load_pretrained(path)
    torch.save({"model": {f"blocks.{10**9}.x": torch.zeros(1), "cls_token": torch.zeros(1, 1, 64)}}, path)
    with pytest.raises(ModelError, match=str(path)):
        load_pretrained(path)


# Where fine-tuning starts


def test_a_classifier_from_an_mtm() -> None:
    mtm = nano_mtm().eval()
    nn.init.normal_(mtm.encoder.norm.bias)
    model = classifier_from(mtm, 10, drop_path_rate=0.2, token_drop_rate=0.0)
    tensors = model.state_dict()
    taken = {n: t for n, t in mtm.encoder.state_dict().items() if not n.startswith("norm.")}
    assert set(tensors) - set(taken) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert all(torch.equal(tensors[n], t) for n, t in taken.items())
    assert not model.fc_norm.bias.any() and model.pos_embed.requires_grad
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2) and model.patch_embed.token_drop.p == 0.0
    ids = batch("mtm")
    outputs = mtm.encoder.blocks(mtm.encoder._pos_embed(mtm.encoder.patch_embed(ids)))
    torch.testing.assert_close(model.eval().forward_features(ids), outputs)


def test_the_new_head_is_small() -> None:
    model = classifier_from(nano_mtm(), 100)
    sample = model.head.weight.detach().flatten().numpy()
    assert stats.kstest(sample, stats.norm(scale=2e-5).cdf).pvalue > 1e-3
    assert not model.head.bias.any()


def test_positions_are_resampled_where_the_grid_differs() -> None:
    mtm = nano_mtm()
    with torch.no_grad():  # a ramp from left to right stays one, but for the border
        mtm.encoder.pos_embed[0, 1:] = torch.arange(4.0).repeat(4).unsqueeze(1)
        mtm.encoder.pos_embed[0, 0] = 5.0
    model = classifier_from(mtm, 10, img_size=16)
    rows = model.pos_embed.detach()[0, 1:, 0].view(8, 8)
    torch.testing.assert_close(
        rows[:, 2:6], torch.tensor([0.75, 1.25, 1.75, 2.25]).expand(8, 4), atol=0.05, rtol=0
    )
    assert torch.equal(model.pos_embed[0, 0], torch.full((96,), 5.0))
    assert model(batch("mtm", 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("name", SMALL)
def test_a_classifier_from_a_classifier(name: str) -> None:
    source = make(name).eval()
    model = classifier_from(source, 3, drop_path_rate=0.1).eval()
    changed = {n for n, t in model.state_dict().items() if source.state_dict()[n].shape != t.shape}
    assert changed == {f"{source.pretrained_cfg['classifier']}.{part}" for part in ("weight", "bias")}
    assert torch.equal(model.forward_features(batch(name)), source.forward_features(batch(name)))
    source.reset_classifier(0)
    model.reset_classifier(0)
    assert torch.equal(model(batch(name)), source(batch(name)))


@pytest.mark.parametrize("name", ["seit_vit_nano", "seit_vit_tiny", "mtm_vit_tiny"])
def test_pixels_from_tokens(tmp_path, name: str) -> None:
    source = make(name).eval()
    model = pixel_classifier_from(source, 5, img_size=64, drop_path_rate=0.1).eval()
    new = {n for n, t in model.state_dict().items() if not torch.equal(source.state_dict().get(n, t[:0]), t)}
    assert new == {"patch_embed.proj.weight", "patch_embed.proj.bias", "head.weight", "head.bias"}
    assert model.pretrained_cfg["architecture"] == f"vit_{'base' if 'nano' in name else 'tiny'}_patch16_224"
    images = torch.randn(2, 3, 64, 64)
    assert model(images).shape == (2, 5)
    save_classifier(tmp_path / "m", model, None, class_names=None)
    assert torch.equal(load_classifier(tmp_path / "m").model(images), model(images))


def test_pixels_from_an_mtm_and_another_grid() -> None:
    mtm = nano_mtm()
    model = pixel_classifier_from(mtm, 5, img_size=96)
    assert model.pos_embed.shape == (1, 37, 96)
    assert torch.equal(model.blocks[2].mlp.fc1.weight, mtm.encoder.blocks[2].mlp.fc1.weight)
    with pytest.raises(ModelError, match="got a TokenResNet, expected a ViT"):
        pixel_classifier_from(make("seit_resnet18"), 5)
