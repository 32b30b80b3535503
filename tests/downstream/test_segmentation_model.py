"""The segmenter against plain references: backbone, loss, optimizer's groups, sliding windows, exact score, file.

Also a program of several processes, which one test launches; what rank 0 found goes into the folder it is given.
"""

import json
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from mmengine.config import ConfigDict
from support.models import tiny_mtm
from support.running import distributed
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from downstream.segmentation.backbone import PixelTokenViT, TokenViT, backbone_from, level_blocks
from downstream.segmentation.inference import WINDOWS, predict_labels, slide_logits, view_scores
from downstream.segmentation.metric import IoUMetric, SegmentationScore
from downstream.segmentation.mmseg import ExtraError, load_mmseg
from downstream.segmentation.model import (
    TokenSegmenter,
    broadcast_statistics,
    build_segmenter,
    load_segmenter,
    save_segmenter,
    segmentation_loss,
)
from seitpp.codebook import embed, nearest
from seitpp.engine.optim import adamw
from seitpp.models import ModelError, load_pretrained, save_classifier, save_release
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.tensors import save_tensors
from seitpp.tokenizers.patch_kmeans import PatchKMeans

CODES, DIM, CLASSES, PATCH = 17, 6, 20, 4
SIZE = {"embed_dim": 64, "depth": 2, "num_heads": 1}
KINDS = {"ids": ("mtm_vit_nano", {"num_codes": CODES}), "maps": ("seit_vit_nano", {})}
CODEBOOK = torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(0))


def backbone(kind: str, window: int = 8, **size: int) -> TokenViT:
    name, arguments = KINDS[kind]
    return TokenViT(name, img_size=window, in_chans=DIM, **arguments, **{**SIZE, **size})


def segmenter(kind: str, window: int = 8, **size: int) -> TokenSegmenter:
    """With logits that differ, which those of a new head hardly do."""
    torch.manual_seed(0)
    model = build_segmenter(backbone(kind, window, **size), CLASSES, channels=32)
    nn.init.normal_(model.decode_head.conv_seg.weight)
    return model.eval()


def some_ids(*shape: int) -> Tensor:
    return torch.randint(CODES, shape, generator=torch.Generator().manual_seed(1))


def some_labels(*shape: int) -> Tensor:
    """Of classes 0 to CLASSES - 2, a tenth of them ignored."""
    generator = torch.Generator().manual_seed(2)
    ignored = torch.rand(shape, generator=generator) < 0.1
    return torch.randint(CLASSES - 1, shape, generator=generator).masked_fill(ignored, 255)


# The backbone


@pytest.mark.parametrize(("depth", "blocks"), [(1, [0] * 4), (3, [0, 1, 1, 2]), (12, [3, 5, 7, 11])])
def test_levels_are_the_outputs_of_their_blocks(depth: int, blocks: list[int]) -> None:
    model, ids = backbone("ids", depth=depth).eval(), some_ids(2, 8, 8)
    assert level_blocks(depth) == blocks
    outputs, vit = [], model.vit
    x = torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed(ids).flatten(1, 2)], dim=1) + vit.pos_embed
    for block in vit.blocks:
        x = block(x)
        outputs.append(x[:, 1:].transpose(1, 2).reshape(2, 64, 4, 4))
    for level, block in zip(model(ids), blocks, strict=True):
        torch.testing.assert_close(level, outputs[block])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [3, 12])
def test_every_parameter_learns(kind: str, depth: int) -> None:
    model = segmenter(kind, depth=depth).train()
    inputs = model.backbone.from_ids(some_ids(2, 8, 8), CODEBOOK)
    segmentation_loss(model, inputs, some_labels(2, 32, 32))[0].backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias before a batch norm is taken off again: its gradient is rounding, and whether it is 0 is chance.
    assert [name for name in still if name != "neck.upsample_4x.0.bias"] == []
    assert all(p.grad is not None for p in model.parameters())


def test_what_the_backbone_takes() -> None:
    ids = some_ids(2, 8, 8)
    maps = embed(ids, CODEBOOK)
    for kind, inputs in (("ids", ids), ("maps", maps)):
        model = backbone(kind)
        assert torch.equal(model.from_ids(ids.to(torch.uint16), CODEBOOK), inputs)
        assert torch.equal(model.from_maps(maps, CODEBOOK, "cosine"), inputs)


def sources(folder: Path) -> dict[str, Path]:
    """Trained models in files, ours and official: each on 8 x 8 tokens."""
    torch.manual_seed(0)
    classifiers = {
        kind: timm.create_model(name, img_size=8, in_chans=DIM, num_classes=5, **arguments, **SIZE)
        for kind, (name, arguments) in KINDS.items()
    }
    mtm = tiny_mtm(num_codes=CODES, code_dim=DIM, encoder_size=SIZE)
    save_pretrained(folder / "mtm", mtm, "abc")
    save_release(mtm, folder / "mtm.pth")
    for kind, model in classifiers.items():
        save_classifier(folder / kind, model, "abc", class_names=None)
        save_release(model, folder / f"{kind}.pth")
    return {path.name: path for path in folder.iterdir()}


def test_checkpoints(tmp_path: Path) -> None:
    files = sources(tmp_path)
    assert len(files) == 6
    for name, path in files.items():
        source = load_pretrained(path).model
        model, body = backbone_from(source).eval(), getattr(source, "encoder", source)
        inputs = model.from_ids(some_ids(2, 8, 8), CODEBOOK)
        assert model.input_kind == ("maps" if name.startswith("maps") else "ids") and model.window == (8, 8)
        images = inputs.unsqueeze(1) if model.input_kind == "ids" else inputs
        expected = body.forward_intermediates(images, norm=False, intermediates_only=True)
        for level, block in zip(model(inputs), [0, 0, 1, 1], strict=True):
            torch.testing.assert_close(level, expected[block])
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_positions_are_resized(tmp_path: Path) -> None:
    source = load_pretrained(sources(tmp_path)["mtm"]).model
    larger = backbone_from(source, 16, drop_path_rate=0.1).eval()
    expected = resample_abs_pos_embed(source.encoder.pos_embed, (8, 8), (4, 4))
    assert larger.window == (16, 16) and torch.equal(larger.vit.pos_embed, expected)
    assert larger.vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    other = backbone_from(source, 16).eval()
    other.vit.set_input_size((12, 20))
    for level, same in zip(larger(some_ids(1, 12, 20)), other(some_ids(1, 12, 20)), strict=True):
        assert level.shape == (1, 64, 6, 10)
        torch.testing.assert_close(level, same)


@pytest.mark.parametrize("name", ["seit_resnet18", "vit_tiny_patch16_224"])
def test_other_models_are_no_backbones(name: str) -> None:
    with pytest.raises(ModelError, match="expected a ViT of tokens: a seit_vit_"):
        backbone_from(timm.create_model(name, num_classes=3))


# Training


def test_loss_is_that_of_both_heads_over_all_pixels() -> None:
    model, ids, labels = segmenter("ids"), some_ids(2, 8, 8), some_labels(2, 32, 32)
    loss, parts = segmentation_loss(model, ids, labels)
    features = model.extract_feat(ids)
    expected = []
    for head in (model.decode_head, model.auxiliary_head):
        logits = F.interpolate(head(features), (32, 32), mode="bilinear")
        expected.append(F.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / labels.numel())
    torch.testing.assert_close(loss, expected[0] + 0.4 * expected[1])
    torch.testing.assert_close(parts["decode.loss_ce"], expected[0].detach())
    assert set(parts) == {"decode.loss_ce", "decode.acc_seg", "aux.loss_ce", "aux.acc_seg"}
    assert all(part.shape == () and not part.requires_grad for part in parts.values())


def test_layers_learn_at_their_rates() -> None:
    model = segmenter("ids", depth=12)
    optimizer = adamw(model, 0.05, layer_decay=0.65)
    found = [(id(p), group) for group in optimizer.param_groups for p in group["params"]]
    groups = dict(found)
    assert len(found) == len(groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group, parts = groups[id(parameter)], name.split(".")
        above = 0 if parts[0] != "backbone" else 12 - int(parts[3]) if parts[2] == "blocks" else 13
        assert group["lr_scale"] == pytest.approx(0.65**above), name
        plain = parameter.ndim == 1 or name.endswith(("cls_token", "pos_embed"))
        assert group["weight_decay"] == (0 if plain else 0.05), name


def test_published_head() -> None:
    model = build_segmenter(backbone("ids"), 150, sync_norm=True)
    head, other = model.decode_head, model.auxiliary_head
    assert (head.channels, head.in_channels, head.dropout_ratio) == (64, [64] * 4, 0.1)
    assert head.psp_modules.pool_scales == (1, 2, 3, 6) and head.align_corners is False
    assert (other.channels, other.num_convs, other.in_index, other.loss_decode.loss_weight) == (256, 1, 2, 0.4)
    assert [part.conv_seg.weight.std().item() for part in (head, other)] == pytest.approx([0.01, 0.01], rel=0.05)
    norms = [module for module in model.modules() if "BatchNorm" in type(module).__name__]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)


# Sliding windows


def plain_slide(model: TokenSegmenter, inputs: Tensor, window: int, stride: int) -> Tensor:
    """Window by window, as the loop of mmsegmentation, with edges repeated where an image is too small."""
    height, width = inputs.shape[-2:]
    at = [np.minimum(np.arange(max(side, window)), side - 1) for side in (height, width)]
    inputs = inputs[..., at[0], :][..., at[1]]
    sides = inputs.shape[-2:]
    total, seen = (torch.zeros(1, n, PATCH * sides[0], PATCH * sides[1]) for n in (CLASSES, 1))
    for row in range(max(sides[0] - window + stride - 1, 0) // stride + 1):
        for column in range(max(sides[1] - window + stride - 1, 0) // stride + 1):
            y, x = min(row * stride, sides[0] - window), min(column * stride, sides[1] - window)
            logits = model(inputs[..., y : y + window, x : x + window], mode="tensor")
            logits = F.interpolate(logits, (PATCH * window, PATCH * window), mode="bilinear")
            around = (x, sides[1] - window - x, y, sides[0] - window - y)
            padding = [PATCH * n for n in around]
            total, seen = total + F.pad(logits, padding), seen + F.pad(torch.ones_like(logits[:, :1]), padding)
    return (total / seen)[..., : PATCH * height, : PATCH * width]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(8, 8), (8, 23), (17, 9), (5, 21), (3, 2)])
@torch.no_grad()
def test_windows_equal_a_plain_loop(kind: str, grid: tuple[int, int]) -> None:
    model = segmenter(kind)
    inputs = model.backbone.from_ids(some_ids(2, *grid), CODEBOOK)
    sizes = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    found = slide_logits(model, inputs, window=8, stride=5, pixels_per_token=PATCH)
    assert max(sizes) <= WINDOWS and found.dtype == torch.float32
    expected = torch.cat([plain_slide(model, image.unsqueeze(0), 8, 5) for image in inputs])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if grid == (8, 8):
        whole = F.interpolate(model(inputs, mode="tensor"), (32, 32), mode="bilinear")
        torch.testing.assert_close(found, whole)


@torch.no_grad()
def test_views_are_averaged_as_probabilities() -> None:
    model, ids = segmenter("ids"), some_ids(2, 8, 12)
    settings = {"window": 8, "stride": 5, "pixels_per_token": PATCH}
    one = view_scores(model, ids.to(torch.uint16), CODEBOOK, **settings)
    torch.testing.assert_close(one, slide_logits(model, ids, **settings).softmax(dim=1))
    maps = embed(ids, CODEBOOK)
    smaller = F.interpolate(maps, (6, 9), mode="bicubic")
    views = []
    for view in (maps, smaller):
        for mirrored in (False, True):
            inputs = nearest(view.flip(-1) if mirrored else view, CODEBOOK)
            logits = slide_logits(model, inputs, **settings)
            logits = logits.flip(-1) if mirrored else logits
            views.append(F.interpolate(logits, (32, 48), mode="bilinear").softmax(dim=1))
    found = view_scores(model, ids, CODEBOOK, **settings, scales=(1.0, 0.75), mirror=lambda maps: maps.flip(-1))
    torch.testing.assert_close(found, sum(views) / 4)


def test_labels_are_those_of_the_resized_logits() -> None:
    logits = torch.randn(2, 37, 6, 9, generator=torch.Generator().manual_seed(0))
    labels = predict_labels(logits, (13, 11))
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), F.interpolate(logits, (13, 11), mode="bilinear").argmax(dim=1))


# Pixels


@pytest.fixture(scope="module")
def tokenizer() -> PatchKMeans:
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return PatchKMeans.fit(images, image_size=32, patch=PATCH, num_codes=CODES, code_dim=DIM)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_pixels_with_the_tokenizer_inside(tokenizer: PatchKMeans, tmp_path: Path, kind: str) -> None:
    """In mmsegmentation's own windows, and then without the tokenizer, on its tokens."""
    torch.manual_seed(0)
    model = build_segmenter(PixelTokenViT(tokenizer, backbone(kind).vit), CLASSES, channels=32).eval()
    image = torch.randint(256, (3, 32, 57), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = model.data_preprocessor({"inputs": [image.flip(0)]})["inputs"]
    torch.testing.assert_close(pixels, image.unsqueeze(0) / 255)
    model.test_cfg = ConfigDict(mode="slide", crop_size=(32, 32), stride=(21, 21))
    torch.testing.assert_close(
        slide_logits(model, pixels, window=32, stride=21, pixels_per_token=1),
        model.slide_inference(pixels, [{}]),
        atol=1e-6,
        rtol=1e-4,
    )
    save_segmenter(
        tmp_path / "model",
        model,
        codebook=None,
        class_names=list(map(str, range(CLASSES))),
        pixels_per_token=PATCH,
        short_side=None,
    )
    of_tokens = load_segmenter(tmp_path / "model").model
    tokenizer.set_image_size(32)
    inputs = of_tokens.backbone.from_ids(tokenizer.encode(pixels[..., :32]), tokenizer.codebook)
    assert torch.equal(of_tokens(inputs, mode="tensor"), model(pixels[..., :32], mode="tensor"))
    assert not [name for name in model.state_dict() if "tokenizer" in name]
    copied = deepcopy(tokenizer)
    PixelTokenViT(copied, backbone(kind).vit).to("meta")
    assert copied.codebook.is_meta


# The file


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_saved_segmenter_gives_the_same_logits(tmp_path: Path, kind: str) -> None:
    model, names = segmenter(kind, 12), [f"class {i}" for i in range(CLASSES)]
    for buffer in model.decode_head.buffers():
        buffer += 1
    facts = {"codebook": "abc", "class_names": names, "pixels_per_token": PATCH, "short_side": 64}
    save_segmenter(tmp_path / "model.safetensors", model, **facts)
    saved = load_segmenter(tmp_path)
    inputs = model.backbone.from_ids(some_ids(2, 12, 12), CODEBOOK)
    assert torch.equal(saved.model(inputs, mode="tensor"), model(inputs, mode="tensor"))
    assert saved[1:] == ("abc", names, PATCH, (12, 12), 64) and not saved.model.training


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"no model file at {tmp_path / 'none'}"):
        load_segmenter(tmp_path / "none")
    with pytest.raises(ModelError, match=r"mtm is of another kind: expected the model\.safetensors of a segm"):
        load_segmenter(sources(tmp_path)["mtm"])
    backbone = {"vit": "mtm_vit_nano", "img_size": [8, 8], "depth": 1}
    header = {"backbone": backbone, "channels": 8, "codebook": None, "class_names": ["a", "b"], "patch": 8}
    for wrong, message in (
        ({"backbone": {**backbone, "vit": "hf-hub:somebody/model"}}, "header has vit 'hf-hub:somebody/model'"),
        ({"backbone": {**backbone, "pretrained": True}}, "header has pretrained True"),
        ({"backbone": {**backbone, "depth": 10**6}}, "1,000,000 blocks"),
        ({}, "but it has 0 tensors"),
        ({"channels": 10**9}, "header has channels 1000000000"),
        ({"class_names": []}, r"header has class_names \[\]"),
    ):
        save_tensors(tmp_path / "m", {"x": torch.zeros(1)}, key="segmenter", header={**header, **wrong})
        with pytest.raises(ModelError, match=message):
            load_segmenter(tmp_path / "m")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmseg.utils", None)
    with pytest.raises(ExtraError, match=r'pip install "seitpp\[segmentation\]"'):
        load_mmseg.__wrapped__()


# The score


IMAGES = 7


def judged() -> tuple[np.ndarray, np.ndarray]:
    """Predictions, mostly right, and labels of seven images; of the last class there is no pixel."""
    labels = some_labels(IMAGES, 9, 13).numpy()
    generator = np.random.default_rng(0)
    wrong = generator.random(labels.shape) < 0.3
    predictions = np.where(wrong | (labels == 255), generator.integers(CLASSES - 1, size=labels.shape), labels)
    return predictions.astype(np.uint8), labels.astype(np.uint8)


def counted(rank: int, ranks: int, batch_size: int) -> SegmentationScore:
    """Every n-th image, in batches."""
    predictions, labels = (torch.from_numpy(part)[rank::ranks] for part in judged())
    score = SegmentationScore([str(i) for i in range(CLASSES)])
    for start in range(0, len(labels), batch_size):
        score.add(predictions[start : start + batch_size], labels[start : start + batch_size])
    return score


def confusion() -> np.ndarray:
    """Row = label, column = prediction."""
    matrix = np.zeros((CLASSES, CLASSES), np.int64)
    for prediction, label in zip(*(part.flatten() for part in judged()), strict=True):
        if label != 255:
            matrix[label, prediction] += 1
    return matrix


def counts_of(matrix: np.ndarray) -> list[list[int]]:
    hit, predicted, labelled = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)
    return np.stack([hit, predicted + labelled - hit, predicted, labelled]).tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_score_equals_a_confusion_matrix(batch_size: int, tmp_path: Path) -> None:
    score, matrix = counted(0, 1, batch_size), confusion()
    score.reduce(Accelerator(cpu=True), IMAGES)
    assert score.counts.tolist() == counts_of(matrix) and score.counts.dtype == torch.int64
    occurring = matrix[:-1, :-1]
    hit, predicted, labelled = occurring.diagonal(), occurring.sum(axis=0), occurring.sum(axis=1)
    iou, accuracy = 100 * hit / (predicted + labelled - hit), 100 * hit / labelled
    figures, summary = score.per_class(), score.summary()
    np.testing.assert_allclose(figures["IoU"], [*iou, np.nan], rtol=1e-12)
    np.testing.assert_allclose(figures["Acc"], [*accuracy, np.nan], rtol=1e-12)
    expected = {"mIoU": iou.mean(), "aAcc": 100 * hit.sum() / matrix.sum(), "mAcc": accuracy.mean()}
    assert summary == pytest.approx(expected, rel=1e-12) and list(summary) == list(expected)
    metric = IoUMetric()
    metric.dataset_meta = {"classes": score.class_names}
    rounded = metric.compute_metrics([tuple(score.counts)])
    assert rounded == pytest.approx({name: round(value, 2) for name, value in summary.items()})


def test_table_and_csv(tmp_path: Path) -> None:
    score = SegmentationScore(["wall", "sky", "a long name"])
    score.add(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 0, 255]]))
    assert score.table().splitlines() == [
        "class           IoU     Acc   share",
        "wall          66.67   66.67  100.00",
        "sky            0.00     nan    0.00",
        "a long name     nan     nan    0.00",
        "mIoU 33.33, aAcc 66.67, mAcc 66.67 of 1 images",
    ]
    score.write_csv(tmp_path / "score.csv")
    rows = [line.split(",") for line in (tmp_path / "score.csv").read_text().splitlines()]
    assert rows[0] == ["class", "IoU", "Acc", "share"] and rows[2:] == [
        ["sky", "0.0", "", "0.0"],
        ["a long name", "", "", "0.0"],
    ]
    assert [float(value) for value in rows[1][1:]] == pytest.approx([200 / 3, 200 / 3, 100], rel=1e-12)


def test_counts_are_exact_beyond_floating_point_and_take_no_room() -> None:
    score, image = SegmentationScore(["a", "b"]), torch.zeros(1, 1, dtype=torch.uint8)
    score.counts += 2**53 - 1
    for _ in range(2):
        score.add(image, image)
    assert score.counts[0].tolist() == [2**53 + 1, 2**53 - 1]
    tensors = [value for value in vars(score).values() if isinstance(value, Tensor)]
    assert [tensor.shape for tensor in tensors] == [(4, 2)]


def test_images_that_are_missing_are_noticed() -> None:
    with pytest.raises(AssertionError, match="7 images were counted, not 8"):
        counted(0, 1, 2).reduce(Accelerator(cpu=True), IMAGES + 1)


# Several processes


def on_two_processes(folder: Path) -> None:
    """Score, statistics and two steps of training; what rank 0 found is written down."""
    accelerator = Accelerator()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    counts = []
    for batch_size in (1, 3):
        score = counted(rank, ranks, batch_size)
        score.reduce(accelerator, IMAGES)
        counts.append(score.counts.tolist())
    model = segmenter("ids").train()
    wrapped = accelerator.prepare(model)
    for _ in range(2):  # a parameter without a gradient would stop the second
        loss, _ = segmentation_loss(wrapped, some_ids(2, 8, 8) * rank, some_labels(2, 32, 32))
        accelerator.backward(loss)
    means = [statistics(model, accelerator)]
    broadcast_statistics(model)
    means.append(statistics(model, accelerator))
    if rank == 0:
        (folder / "found.json").write_text(json.dumps({"counts": counts, "means": means}))


def statistics(model: nn.Module, accelerator: Accelerator) -> Sequence[Sequence[float]]:
    """Of each process, all that its batch norms keep."""
    kept = torch.cat([buffer.flatten().float() for buffer in model.buffers()])
    return accelerator.gather(kept.unsqueeze(0)).tolist()


def test_two_processes(tmp_path: Path) -> None:
    finished = distributed(2, Path(__file__), tmp_path)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["counts"] == 2 * [counts_of(confusion())]
    before, after = found["means"]
    assert before[0] != before[1] and after == 2 * [before[0]]


if __name__ == "__main__":
    on_two_processes(Path(sys.argv[1]))
