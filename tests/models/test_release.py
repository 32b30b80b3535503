"""Released checkpoints against a reference of their own: plain tensors under the released names."""

import argparse
import os
import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from support import release_reference as reference
from support.release_reference import CODES, DIM, PATCHES, Weights
from torch import Tensor, nn

from seitpp.augment import Keys
from seitpp.codebook import codebook_fingerprint
from seitpp.engine.inputs import open_tokenadapt
from seitpp.errors import UserError
from seitpp.models import (
    MTM,
    ModelError,
    TokenAdapt,
    from_release,
    load_classifier,
    load_mtm,
    load_pretrained,
    save_classifier,
    save_release,
    to_release,
)
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.objectives import mask_plan, masked_token_loss

STATES = {
    "seit": reference.seit_state(),
    "seitpp": reference.seitpp_state(),
    "seitpp published": reference.published(reference.seitpp_state()),
    "mtm": reference.mtm_state(),
    "mtm published": reference.published(reference.mtm_state()),
    "tokenadapt": reference.tokenadapt_state(),
}
CARRIERS = ["seitpp published", "mtm published"]
FILES = ["deit", "bare", "ddp", "safetensors"]


def some_ids() -> Tensor:
    return torch.randint(CODES, (3, 8, 8), generator=torch.Generator().manual_seed(1))


def some_maps(side: int = 8) -> Tensor:
    return torch.randn(3, DIM, side, side, generator=torch.Generator().manual_seed(1))


def written(folder: Path, state: Weights, layout: str = "deit") -> Path:
    """A file of `state` as they are found: DeiT's, a bare state dict, one of DDP, or safetensors."""
    path = folder / f"released.{'safetensors' if layout == 'safetensors' else 'pth'}"
    if layout == "safetensors":
        save_file(state, path)
    elif layout == "deit":
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))]).state_dict()
        arguments = argparse.Namespace(lr=0.1, model="deit_small_token_32", betas=(0.9, 0.95), resume=None)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items() if torch.is_tensor(tensor)}
        content = {"model": state, "model_ema": zeros, "args": arguments, "optimizer": optimizer, "epoch": 299}
        torch.save(content, path)
    else:
        prefix = "module." if layout == "ddp" else ""
        torch.save({prefix + name: tensor for name, tensor in state.items()}, path)
    return path


def load(tmp_path: Path, state: Weights, layout: str = "deit", **part: str) -> nn.Module:
    """Through a file, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return from_release(written(tmp_path, state, layout), **part)


close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


def check(kind: str, model: nn.Module) -> None:
    """The outputs of a model against those of the reference."""
    state, ids = STATES[kind], some_ids()
    assert not model.training
    if kind == "seit":
        close(model(some_maps()), reference.seit_logits(state, some_maps(), 2, 1))
    elif kind.startswith("seitpp"):
        close(model(ids), reference.seitpp_logits(state, ids))
    elif kind.startswith("mtm"):
        check_mtm(model, state, ids)
    else:
        whole, augmented = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 6, 6)
        close(model.convert(whole), reference.plain_convert(whole, state))
        close(model.invert(augmented), reference.plain_invert(augmented, state))


def check_mtm(model: MTM, state: Weights, ids: Tensor) -> None:
    plan = mask_plan(Keys(0, 0, torch.arange(3)).uniform("mask", PATCHES), 5, 9)
    logits, expected = model(ids, plan), reference.mtm_logits(state, ids, plan.kept, plan.hidden)
    # (B, L, 4, K) -> (B, K, H, W), a patch being two tokens high and two wide
    grid = expected.view(3, 4, 4, 2, 2, CODES).permute(0, 5, 1, 3, 2, 4).reshape(3, CODES, 8, 8)
    close(logits, grid)
    close(masked_token_loss(logits, ids, plan), reference.mtm_loss(expected, ids, plan.hidden))
    assert not model.encoder.pos_embed.requires_grad


def assert_same(one: nn.Module, two: nn.Module) -> None:
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(t, two.state_dict()[name]) for name, t in one.state_dict().items())


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("kind", STATES)
def test_in_from_every_file(tmp_path, kind: str, layout: str) -> None:
    model = load(tmp_path, STATES[kind], layout)
    check(kind, model)
    if kind != "tokenadapt":
        assert_same(load_pretrained(written(tmp_path, STATES[kind], layout)).model, model)


@pytest.mark.parametrize("kind", STATES)
def test_out_again(tmp_path, kind: str) -> None:
    """Names, shapes and values are those of what was read, strictly."""
    state = STATES[kind]
    model = load(tmp_path, state)
    adapt = load(tmp_path, state, part="tokenadapt") if kind in CARRIERS else None
    again = to_release(model, adapt)
    plain = reference.plain_module(state)
    plain.load_state_dict(again, strict=True)
    for name, tensor in plain.state_dict().items():
        assert again[name].shape == state[name].shape, name
        if name == "decoder_pos_embed":  # which is not read but known
            close(tensor, state[name])
        else:
            assert torch.equal(tensor, state[name]), name
    save_release(model, tmp_path / "again.pth", adapt)
    assert torch.load(tmp_path / "again.pth", weights_only=True).keys() == {"model"}
    assert_same(from_release(tmp_path / "again.pth"), model)


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("kind", [*CARRIERS, "tokenadapt"])
def test_the_tokenadapt_is_taken_out(tmp_path, kind: str, layout: str) -> None:
    adapt = load(tmp_path, STATES[kind], layout, part="tokenadapt")
    assert isinstance(adapt, TokenAdapt) and not adapt.training
    check("tokenadapt", adapt)
    assert to_release(adapt).keys() == STATES["tokenadapt"].keys()
    assert all(torch.equal(tensor, STATES["tokenadapt"][name]) for name, tensor in to_release(adapt).items())
    codebook, path = np.zeros((CODES, 4), np.float32), str(written(tmp_path, STATES[kind], layout))
    assert_same(open_tokenadapt(path, codebook, "the store"), adapt)
    for other, found in ((codebook[1:], "16 codes of 4"), (codebook[:, 1:], "17 codes of 3")):
        refusal = (
            f"the codebook of the store has {found} dimensions, the TokenAdapt in {path} takes 17 codes of 4 "
            "dimensions: name its tokenizer or a store of it"
        )
        with pytest.raises(UserError, match=f"^{re.escape(refusal)}$"):
            open_tokenadapt(path, other, "the store")


@pytest.mark.parametrize(
    ("name", "kernel", "stride", "padding"), [("linear", 1, 1, 0), ("conv2", 2, 2, 0), ("conv4", 4, 2, 1)]
)
def test_stems(tmp_path, name: str, kernel: int, stride: int, padding: int) -> None:
    state, maps = reference.seit_state(kernel), some_maps(4 * stride)
    model = load(tmp_path, state)
    assert model.patch_embed.stem == name
    close(model(maps), reference.seit_logits(state, maps, stride, padding))


@pytest.mark.parametrize("kind", ["seit", "seitpp published"])
def test_the_norm_after_the_mean_may_be_called_fc_norm(tmp_path, kind: str) -> None:
    state = STATES[kind]
    other = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in state.items()
    }
    assert set(other) != set(state)
    assert_same(load(tmp_path, other), load(tmp_path, state))


def test_axes_of_one_element_may_differ(tmp_path) -> None:
    """As far as they are read; what is written has the released shapes."""
    state = STATES["mtm published"]
    bare = ("mlm_layer.bias", "mask_token_label", "decoder_pos_embed_learned", "pos_embed")
    squeezed = {name: state[name].squeeze() for name in bare} | {"cls_token": state["cls_token"].unsqueeze(0)}
    model = load(tmp_path, {**state, **squeezed})
    assert_same(model, load(tmp_path, STATES["mtm"]))
    shapes = {name: tensor.shape for name, tensor in to_release(model).items()}
    assert shapes == {name: tensor.shape for name, tensor in STATES["mtm"].items()}


def without(kind: str, *beginnings: str) -> Weights:
    return {name: tensor for name, tensor in STATES[kind].items() if not name.startswith(beginnings)}


def test_what_is_not_used_is_named_in_one_warning(tmp_path) -> None:
    """Not the unused positions of MTM, nor a TokenAdapt, unless a part of it is missing."""
    path = written(tmp_path, {**STATES["mtm published"], "spare.weight": torch.zeros(3)})
    with pytest.warns(UserWarning) as caught:
        from_release(path)
    assert [str(w.message) for w in caught] == [f"{path}: 1 tensors are not used: spare.weight"]
    assert caught[0].filename == __file__
    path = written(tmp_path, without("mtm published", "reverse_transform.", "conversion_function.1"))
    with pytest.warns(UserWarning) as caught:
        check("mtm published", from_release(path))
    names = "conversion_function.0.bias, conversion_function.0.weight"
    assert [str(w.message) for w in caught] == [f"{path}: 2 tensors are not used: {names}"]
    for kind in ("tokenadapt", "seitpp published"):
        path = written(tmp_path, {**STATES[kind], "reverse_transform.2.weight": torch.zeros(3)})
        with pytest.warns(UserWarning, match=r"1 tensors are not used: reverse_transform.2.weight"):
            from_release(path)


@pytest.mark.parametrize(
    ("kind", "lost", "part", "message"),
    [
        (
            "mtm published",
            ("decoder_", "mask_token"),
            "model",
            "(MTM) lacks mask_token_label, decoder_embed.*, decoder_pos_embed_learned, decoder_blocks.*, "
            "decoder_norm.*",
        ),
        ("mtm", ("decoder_embed.bias",), "model", "(MTM) lacks decoder_embed.bias"),
        ("seitpp published", ("head.",), "model", "(SeiT++ classifier) lacks head.*"),
        ("seit", ("norm.", "head."), "model", "(SeiT classifier) lacks head.*"),
        ("seit", ("norm.",), "model", "(SeiT classifier) lacks norm.weight, norm.bias"),
        ("tokenadapt", ("reverse_transform.",), "model", "(TokenAdapt) lacks reverse_transform.*"),
        ("mtm published", ("reverse_transform.",), "tokenadapt", "(TokenAdapt) lacks reverse_transform.*"),
        (
            "seit",
            ("blocks.0.attn", "blocks.0.mlp", "blocks.0.norm1"),
            "model",
            "(SeiT classifier) lacks blocks.0.norm1.weight, blocks.0.norm1.bias, blocks.0.attn.qkv.weight, "
            "blocks.0.attn.qkv.bias, blocks.0.attn.proj.weight, blocks.0.attn.proj.bias, "
            "blocks.0.mlp.fc1.weight, blocks.0.mlp.fc1.bias and 2 more",
        ),
        (
            "seitpp",
            (),
            "tokenadapt",
            "(TokenAdapt) lacks conversion_function.*, reverse_transform.*",
        ),
    ],
)
def test_missing_parts_are_named_in_one_line(tmp_path, kind: str, lost: tuple, part: str, message: str) -> None:
    path = written(tmp_path, without(kind, *lost))
    with pytest.raises(ModelError) as refusal:
        from_release(path, part)
    assert str(refusal.value) == f"{path} {message}: name a file that holds all of it"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.mlp.fc2.bias": None}, "lacks blocks.1.mlp.fc2.bias: name a file"),
        ({"cls_token": None}, "lacks cls_token: name a file"),
        ({"head.weight": torch.zeros(5, 3)}, r"head.weight has shape \(5, 3\), expected \(5, 128\)"),
        ({"cls_token": torch.zeros(1, 1, 100)}, "width 100, expected a multiple of 64"),
        ({"pos_embed": torch.zeros(1, 16, 128)}, "15 positions besides that of cls, expected a square grid"),
        ({"patch_embed.proj.weight": torch.zeros(128, 6, 3, 3)}, "stem of kernel 3, expected one of"),
        ({"patch_embed.proj.weight": None}, "lacks patch_embed.proj.weight: name a file"),
        ({"patch_embed.proj.weight": None, "patch_embed.proj.bias": None}, "of no released model"),
        ({"head.weight": "text"}, "holds no state dict"),
    ],
)
def test_bad_states_are_refused(tmp_path, change: dict, message: str) -> None:
    state = {name: tensor for name, tensor in {**STATES["seit"], **change}.items() if tensor is not None}
    with pytest.raises(ModelError, match=message):
        load(tmp_path, state)


class Payload:
    """Whoever unpickles this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path) -> None:
    path, mark = tmp_path / "hostile.pth", tmp_path / "mark"
    torch.save({"model": STATES["seit"], "args": Payload(mark)}, path)
    with pytest.raises(ModelError, match=rf"{path} cannot be read as plain tensors, and is not unpickled"):
        from_release(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the payload was a real one


def test_files_that_are_not_there_or_damaged(tmp_path) -> None:
    with pytest.raises(ModelError, match=f"no checkpoint at {tmp_path / 'none.pth'}"):
        from_release(tmp_path / "none.pth")
    for name in ("damaged.pth", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02 nothing of the kind")
        with pytest.raises(ModelError, match=f"{name} cannot be read"):
            from_release(tmp_path / name)
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ModelError, match="holds no state dict"):
        from_release(tmp_path / "tensor.pth")


def test_published_widths_have_their_names(tmp_path) -> None:
    save_release(timm.create_model("seit_vit_tiny", in_chans=4, num_classes=3, img_size=8), tmp_path / "tiny.pth")
    model = from_release(tmp_path / "tiny.pth")
    assert model.pretrained_cfg["architecture"] == "seit_vit_tiny"
    assert (len(model.blocks), model.blocks[0].attn.num_heads, model.patch_embed.img_size) == (12, 3, (8, 8))


def test_a_model_read_in_can_be_saved_as_ours(tmp_path) -> None:
    model = load(tmp_path, STATES["seitpp"])
    save_classifier(tmp_path / "ours", model, "abc", class_names=None)
    assert_same(load_classifier(tmp_path / "ours").model, model)
    mtm = load(tmp_path, STATES["mtm"])
    save_pretrained(tmp_path / "mtm", mtm, "abc")
    assert_same(load_mtm(tmp_path / "mtm")[0], mtm)


def test_models_without_a_place_in_the_layout_are_not_written() -> None:
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 1}
    with pytest.raises(ModelError, match="heads of 32 channels"):
        to_release(timm.create_model("seit_vit_nano"))
    with pytest.raises(ModelError, match="got a TokenResNet"):
        to_release(timm.create_model("seit_resnet18"))
    with pytest.raises(ModelError, match="expected avg and a classifier head"):
        to_release(timm.create_model("mtm_vit_base", num_classes=0, **sizes))
    with pytest.raises(ModelError, match="expected a square grid"):
        to_release(timm.create_model("mtm_vit_base", img_size=(8, 12), **sizes))
    with pytest.raises(ModelError, match="heads of 16 channels"):
        to_release(
            MTM(
                "mtm_vit_base", grid=(8, 8), decoder_width=64, decoder_depth=1, decoder_heads=4, encoder_size=sizes
            )
        )


def test_a_tokenadapt_goes_beside_models_of_its_codes_only(tmp_path) -> None:
    adapt = TokenAdapt((4, 4), crop=(2, 2), num_codes=5, code_dim=6, width=64, heads=1, mlp=32)
    for model in (load(tmp_path, STATES["seit"]), adapt):
        with pytest.raises(ModelError, match="with a TokenAdapt, expected an MTM or a mtm_vit_"):
            to_release(model, adapt)
    with pytest.raises(ModelError, match="TokenAdapt of 5 codes, expected the 17"):
        to_release(load(tmp_path, STATES["mtm"]), adapt)


def test_a_tokenadapt_of_ours_is_known_by_its_codebook(tmp_path) -> None:
    mtm, adapt = load(tmp_path, STATES["mtm"]), load(tmp_path, STATES["tokenadapt"])
    codebook = np.zeros((CODES, 4), np.float32)
    save_pretrained(tmp_path / "model.safetensors", adapt, codebook_fingerprint(codebook))
    assert_same(open_tokenadapt(str(tmp_path), codebook, "the store"), adapt)
    with pytest.raises(UserError, match="is not the codebook"):
        open_tokenadapt(str(tmp_path), codebook + 1, "the store")
    save_pretrained(tmp_path / "model.safetensors", mtm, codebook_fingerprint(codebook))
    with pytest.raises(ModelError, match=r"of another kind: expected .* tokenadapt_train run"):
        open_tokenadapt(str(tmp_path), codebook, "the store")
    with pytest.raises(ModelError, match="holds a TokenAdapt: expected a classifier or a masked token model"):
        load_pretrained(written(tmp_path, STATES["tokenadapt"]))
