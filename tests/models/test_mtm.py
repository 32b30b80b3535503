"""Masked token modeling, fact by fact."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from bench.mtm_step import TextbookMTM
from scipy import stats
from support.models import tiny_mtm
from torch._dynamo.utils import counters

from seitpp.augment import Keys
from seitpp.engine.metrics import count_flops
from seitpp.models import MTM, ModelError, TokenAdapt, load_mtm, to_release
from seitpp.models.masking import fill_hidden, hidden_tokens
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.objectives import MASK_RATIOS, mask_plan, masked_token_accuracy, masked_token_loss
from seitpp.tokenizers.transformer import sincos_positions

LAW = MASK_RATIOS["seitpp"]


def small_model(**changes) -> MTM:
    torch.manual_seed(0)
    return tiny_mtm(code_dim=16, **changes)


def batch(dropped: int = 7, masked: int = 10):
    ids = torch.randint(64, (4, 8, 8), generator=torch.Generator().manual_seed(1))
    return ids, mask_plan(Keys(0, 0, torch.arange(4)).uniform("mask", 16), dropped, masked)


def test_published_size() -> None:
    model = MTM()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(trained / 1e6, 1) == 98.3
    published = to_release(model, TokenAdapt())  # with all positions, which are not trained
    assert round(sum(t.numel() for t in published.values()) / 1e6, 1) == 103.1
    assert not model.encoder.pos_embed.requires_grad
    assert model.encoder.blocks[0].norm1.eps == model.decoder_norm.eps == 1e-6


def test_initial_tokens_and_positions() -> None:
    model = small_model()
    assert not model.mask_token.any() and not model.decoder_pos_embed.any()
    assert model.mask_token.requires_grad and model.decoder_pos_embed.requires_grad
    assert 0.01 < model.encoder.cls_token.std() < 0.03
    assert torch.equal(model.encoder.pos_embed[0, 1:], sincos_positions((4, 4), 96))
    assert not model.encoder.pos_embed[0, 0].any()


def test_first_loss_is_ln_k() -> None:
    ids, plan = batch()
    loss = masked_token_loss(small_model()(ids, plan), ids, plan)
    assert abs(loss.item() - math.log(64)) < 0.05


def gradients(model: MTM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("codes", "masked"), [(7, 7), (391, 10), (5000, 16)])
def test_training_sees_the_loss_of_the_logits(codes: int, masked: int) -> None:
    """`targets` change how the loss is computed, not the loss: in float32 to rounding, under autocast roughly."""
    model, (ids, plan) = small_model(num_codes=codes, dropout=0.0), batch(masked=masked)
    ids = ids % codes
    torch.nn.init.normal_(model.head.bias)
    torch.nn.init.normal_(model.encoder.patch_embed.token_emb.weight)  # else only the bias says what is likely
    for precision, near, close in ((torch.float32, 1e-6, 1e-4), (torch.bfloat16, 1e-3, 0.03)):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = model(ids, plan)
            found = model(ids, plan, targets=ids)
        assert found.loss.dtype == torch.float32
        loss = masked_token_loss(logits, ids, plan)
        torch.testing.assert_close(found.loss, loss, atol=0, rtol=near)
        torch.testing.assert_close(found.accuracy, masked_token_accuracy(logits, ids, plan), atol=0.02, rtol=0)
        expected = gradients(model, loss)
        for name, gradient in gradients(model, found.loss).items():
            assert (gradient - expected[name]).norm() <= close * expected[name].norm(), name
    assert expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_agrees_with_the_textbook() -> None:
    """The same model in plain PyTorch, all logits at once."""
    model, (ids, plan) = small_model(dropout=0.0, decoder_depth=2), batch()
    textbook = TextbookMTM(model)
    loss = textbook(ids, plan)
    torch.testing.assert_close(model(ids, plan, targets=ids).loss, loss)
    expected = sorted(g.norm() for g in gradients(textbook, loss).values())
    found = sorted(g.norm() for g in gradients(model, model(ids, plan, targets=ids).loss).values())
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("unchecked")
def test_one_graph_for_all_mask_counts() -> None:
    """The first count is a constant of the first graph; a second graph serves all others."""
    model = small_model(dropout=0.0)
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for masked in (10, 12, 7, 16, 9, 10):
        ids, plan = batch(masked=masked)
        found, expected = compiled(ids, plan, targets=ids), model(ids, plan, targets=ids)
        torch.testing.assert_close(found, expected)
        bias = gradients(model, found.loss)["head.bias"]
        torch.testing.assert_close(bias, gradients(model, expected.loss)["head.bias"])
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_flops_are_those_of_hidden_tokens() -> None:
    """A step with more codes or more hidden patches has more operations, in its head and the last block only."""
    ids = torch.zeros(4, 8, 8, dtype=torch.long, device="meta")

    def flops(codes: int, masked: int) -> int:
        plan = mask_plan(torch.zeros(4, 16, device="meta"), 7, masked)
        return count_flops(small_model(num_codes=codes), ids, plan, ids)

    assert flops(64, 10) - flops(44, 10) == 2 * (2 * 4 * 40 * 20 * 16)
    patch = 3 * 2 * (2 * 32 * 128 + 32 * 64) + 2 * (2 * 4 * 64 * 16)
    assert flops(64, 15) - flops(64, 10) == 4 * 5 * patch


def test_every_trained_parameter_gets_a_gradient() -> None:
    model = small_model()
    ids, plan = batch()
    model(ids, plan, targets=ids).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


def test_hidden_content_never_reaches_the_logits() -> None:
    model = small_model().eval()
    ids, plan = batch()
    hidden = hidden_tokens(plan, (8, 8))
    other = torch.where(hidden, (ids + 13) % 64, ids)
    assert torch.equal(model(ids, plan), model(other, plan))
    seen = torch.where(hidden, ids, (ids + 13) % 64)
    assert not torch.allclose(model(ids, plan), model(seen, plan))


def test_dropped_patches_never_enter_the_encoder() -> None:
    model = small_model()
    lengths = []
    model.encoder.blocks[0].register_forward_hook(
        lambda module, inputs, output: lengths.append(inputs[0].shape[1])
    )
    for dropped in (0, 7, 15):
        model(*batch(dropped, 15))
    assert lengths == [1 + 16, 1 + 9, 1 + 1]


def test_hidden_places_of_the_decoder_hold_the_cls_output() -> None:
    """So every hidden place gets the same input but for its position: swapping two of them changes nothing."""
    model = small_model().eval()
    with torch.no_grad():
        model.decoder_pos_embed[:, 1:] = 0
    ids, plan = batch()
    logits = model(ids, plan)
    for image, hidden in zip(logits, hidden_tokens(plan, (8, 8)), strict=True):
        patches = image[:, hidden[:, :]]
        assert patches.shape[1] == 40
        per_patch = image.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)[:, hidden[::2, ::2]]
        torch.testing.assert_close(per_patch, per_patch[:, :1].expand_as(per_patch), atol=1e-5, rtol=0)


def test_loss_is_the_mean_over_hidden_tokens_only() -> None:
    ids, plan = batch()
    logits = torch.randn(4, 64, 8, 8)
    hidden = hidden_tokens(plan, (8, 8))
    expected = F.cross_entropy(logits.permute(0, 2, 3, 1)[hidden], ids[hidden])
    torch.testing.assert_close(masked_token_loss(logits, ids, plan), expected)
    changed = torch.where(hidden.unsqueeze(1), logits, torch.randn(4, 64, 8, 8))
    torch.testing.assert_close(masked_token_loss(changed, ids, plan), expected)
    predicted = (logits.argmax(1) == ids)[hidden].float().mean()
    assert masked_token_accuracy(logits, ids, plan).item() == pytest.approx(predicted.item())


def test_fill_hidden_keeps_what_is_seen() -> None:
    ids, plan = batch()
    logits = torch.randn(4, 64, 8, 8)
    filled, hidden = fill_hidden(logits, ids, plan), hidden_tokens(plan, (8, 8))
    assert torch.equal(filled[~hidden], ids[~hidden])
    assert torch.equal(filled[hidden], logits.argmax(1)[hidden])


def test_hidden_tokens_covers_whole_patches() -> None:
    plan = mask_plan(torch.tensor([[0.0, 1, 2, 3, 4, 5]]), 1, 2)  # patches 0 and 1 of a 2 x 3 patch grid
    expected = torch.zeros(1, 4, 6, dtype=torch.bool)
    expected[:, :2, :4] = True
    assert torch.equal(hidden_tokens(plan, (4, 6)), expected)


def test_plan_drops_a_part_of_what_it_hides() -> None:
    noise = torch.rand(5, 196)
    plan = mask_plan(noise, *LAW.counts(196, 0.55))
    assert LAW.counts(196, 0.55) == (79, 108) and LAW.counts(196, 1.0) == (79, 196)
    assert plan.kept.shape == (5, 117) and (plan.hidden.sum(1) == 108).all()
    for kept, hidden, row in zip(plan.kept, plan.hidden, noise, strict=True):
        dropped = sorted(set(range(196)) - set(kept.tolist()))
        assert hidden[dropped].all() and len(dropped) == 79
        assert row[hidden].max() < row[~hidden].min()
    with pytest.raises(ValueError, match="expected 0 <= dropped <= masked"):
        mask_plan(noise, 10, 9)


@pytest.mark.parametrize("law", MASK_RATIOS.values())
def test_few_patches_leave_one_hidden_and_one_seen(law) -> None:
    for patches in range(2, 16):
        for ratio in (law.lowest, law.mean, law.highest):
            plan = mask_plan(torch.rand(3, patches), *law.counts(patches, ratio))
            seen = ~plan.hidden.gather(1, plan.kept)
            assert (seen.sum(1) >= 1).all() and (plan.hidden.sum(1) >= 1).all()
    assert LAW.counts(16, 1.0) == (7, 16), "that of the digits, as ever"


def test_mask_ratio_follows_the_truncated_normal() -> None:
    ratios = [LAW.ratio(0, step) for step in range(3000)]
    law = stats.truncnorm((0.4 - 0.45) / 0.25, (1 - 0.45) / 0.25, loc=0.45, scale=0.25)
    assert stats.kstest(ratios, law.cdf).pvalue > 1e-3
    assert LAW.ratio(0, 17) == ratios[17] != LAW.ratio(1, 17)


def test_positions_encode_column_then_row() -> None:
    positions = sincos_positions((2, 3), 8).view(2, 3, 8)
    angles = [1.0, 0.01]
    for row in range(2):
        for column in range(3):
            halves = [
                [math.sin(at * a) for a in angles] + [math.cos(at * a) for a in angles] for at in (column, row)
            ]
            assert positions[row, column].tolist() == pytest.approx(halves[0] + halves[1], abs=1e-6)


def test_encoder_goes_into_the_classifier_without_renaming() -> None:
    encoder = small_model().encoder
    classifier = timm.create_model("mtm_vit_nano", img_size=8, in_chans=16, num_codes=64, num_classes=10)
    missing, unexpected = classifier.load_state_dict(encoder.state_dict(), strict=False)
    # Fine-tuning averages the patches first and normalizes then, so the encoder's last norm is not taken over.
    assert set(missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(unexpected) == {"norm.weight", "norm.bias"}


def test_save_and_load(tmp_path) -> None:
    model = small_model().eval()
    save_pretrained(tmp_path / "model.safetensors", model, codebook="abc")
    loaded, codebook, *_ = load_mtm(tmp_path / "model.safetensors")
    ids, plan = batch()
    assert codebook == "abc" and torch.equal(loaded(ids, plan), model(ids, plan))


def test_bad_models_are_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match="multiples of 2"):
        small_model(grid=(7, 8))
    with pytest.raises(ModelError, match="no model file"):
        load_mtm(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08" * 100)
    with pytest.raises(ModelError, match="cannot be read"):
        load_mtm(tmp_path / "broken.safetensors")


def test_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for enabled in (False, True):
        model, (ids, plan) = small_model(dropout=0.1), batch()
        model.set_grad_checkpointing(enabled)
        torch.manual_seed(7)
        found.append(gradients(model, model(ids, plan, targets=ids).loss))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)
