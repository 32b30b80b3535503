"""Filling regions with a masked token model: the rounds, fact by fact, and the recipe as a user runs it."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import inpaint
import pytest
import timm
import torch
from scipy import stats
from support.models import tiny_mtm
from support.running import run

from seitpp.augment import Keys
from seitpp.codebook import codebook_fingerprint
from seitpp.data.digits import digits
from seitpp.errors import UserError
from seitpp.models import MTM, inpainting, save_classifier
from seitpp.models.inpainting import DecodingError, cosine_counts, decoding_plan, fill_iteratively, hidden_patches
from seitpp.models.masking import fill_hidden, hidden_tokens
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.objectives import MASK_RATIOS, mask_plan, masked_token_loss
from seitpp.store import TokenStore

CODES = 64


def small_model() -> MTM:
    """Its logits are spread out, so that the likeliest code is likeliest by far."""
    torch.manual_seed(0)
    model = tiny_mtm(code_dim=16).eval()
    with torch.no_grad():
        model.encoder.patch_embed.token_emb.weight.normal_()
        model.decoder_pos_embed.normal_()
    return model


MODEL = small_model()
IDS = torch.randint(CODES, (4, 8, 8), generator=torch.Generator().manual_seed(1))
KEYS = Keys(0, 0, torch.arange(4))


def some_region(patches: int = 9) -> torch.Tensor:
    """Other patches in each image, the same number."""
    return hidden_tokens(mask_plan(KEYS.uniform("test_region", 16), 0, patches), (8, 8))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("patches", [1, 4, 9, 16])
def test_what_is_visible_stays_and_what_is_hidden_is_never_seen(patches: int, temperature: float) -> None:
    hidden = some_region(patches)
    filled = fill_iteratively(MODEL, IDS, hidden, keys=KEYS, rounds=5, temperature=temperature)
    assert torch.equal(filled[~hidden], IDS[~hidden])
    assert filled.dtype == torch.int64 and filled.min() >= 0 and filled.max() < CODES
    other = torch.where(hidden, (IDS + 13) % CODES, IDS)
    assert torch.equal(
        fill_iteratively(MODEL, other, hidden, keys=KEYS, rounds=5, temperature=temperature), filled
    )


def test_one_round_is_the_likeliest_code_everywhere() -> None:
    hidden = some_region()
    patches, count = hidden_patches(hidden, (4, 4))
    plan = decoding_plan(patches, count, keys=KEYS, turn=0)
    with torch.no_grad():
        expected = fill_hidden(MODEL(IDS, plan), IDS, plan)
    assert torch.equal(fill_iteratively(MODEL, IDS, hidden, keys=KEYS, rounds=1), expected)
    assert not torch.equal(fill_iteratively(MODEL, IDS, hidden, keys=KEYS, rounds=9), expected)


def test_rounds_hide_what_the_schedule_says_and_never_hide_again() -> None:
    """Seen from the model: in the plan of a call, just the surest patches of the last are visible now."""
    calls = []
    handle = MODEL.register_forward_hook(lambda model, inputs, logits: calls.append((*inputs, logits)))
    filled = fill_iteratively(MODEL, IDS, some_region(), keys=KEYS, rounds=4)
    handle.remove()
    assert [plan.hidden.sum(dim=1).tolist() for _, plan, _ in calls] == [[9] * 4, [8] * 4, [6] * 4, [3] * 4]
    for (_, plan, logits), (ids, later, _) in pairwise(calls):
        kept = plan.hidden & ~later.hidden
        assert not (later.hidden & ~plan.hidden).any()
        best = logits.log_softmax(dim=1).amax(dim=1)
        confidence = best.unfold(1, 2, 2).unfold(2, 2, 2).mean(dim=(3, 4)).flatten(1)
        for sureness, shown, still in zip(confidence, kept, later.hidden, strict=True):
            assert sureness[shown].min() > sureness[still].max()
        tokens = hidden_tokens(plan._replace(hidden=kept), (8, 8))
        assert torch.equal(ids[tokens], logits.argmax(dim=1)[tokens])
        assert torch.equal(filled[tokens], ids[tokens])


def test_counts_are_the_cosine() -> None:
    assert cosine_counts(100, 4) == [100, 92, 70, 38, 0]
    assert cosine_counts(9, 4) == [9, 8, 6, 3, 0]
    assert cosine_counts(3, 8) == cosine_counts(3, 3) == [3, 2, 1, 0]
    for hidden in range(1, 60):
        for rounds in range(1, 70):
            counts = cosine_counts(hidden, rounds)
            assert counts[0] == hidden and counts[-1] == 0 and len(counts) == min(hidden, rounds) + 1
            assert all(before > after for before, after in pairwise(counts))


def test_plan_drops_hidden_patches_as_in_training() -> None:
    dropped, _ = MASK_RATIOS["seitpp"].counts(16, 1.0)
    for count in (1, dropped - 1, dropped, 9, 16):
        patches, found = hidden_patches(some_region(count), (4, 4))
        plan = decoding_plan(patches, found, keys=KEYS, turn=0)
        assert found == count and torch.equal(plan.hidden, patches)
        assert plan.kept.shape == (4, 16 - min(dropped, count))
        left = torch.ones(4, 16, dtype=torch.bool).scatter(1, plan.kept, False)
        assert (left & ~patches).sum() == 0
    assert not torch.equal(decoding_plan(patches, found, keys=KEYS, turn=1).kept, plan.kept)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_randomness_belongs_to_the_image(temperature: float, monkeypatch) -> None:
    hidden = some_region()

    def fill(places: list[int], seed: int = 0) -> torch.Tensor:
        torch.rand(3)  # the global generator is not used
        keys = Keys(seed, 0, torch.tensor(places))
        return fill_iteratively(MODEL, IDS[places], hidden[places], keys=keys, rounds=4, temperature=temperature)

    together = fill([0, 1, 2, 3])
    assert torch.equal(fill([0, 1, 2, 3]), together)
    assert torch.equal(fill([2]), together[2:3]) and torch.equal(fill([3, 0]), together[[3, 0]])
    assert not torch.equal(fill([0, 1, 2, 3], seed=1), together)
    batches = []
    with MODEL.register_forward_hook(lambda model, inputs, logits: batches.append(len(logits))):
        for images in (1, 3):
            monkeypatch.setattr(inpainting, "LOGIT_CELLS", images * 64 * CODES)
            assert torch.equal(fill([0, 1, 2, 3]), together)
    assert batches == [1] * 16 + [3] * 4 + [1] * 4


def test_codes_are_drawn_from_the_tempered_softmax() -> None:
    """One round on 3000 copies of an image. All that is hidden is dropped, so the logits are the same."""
    copies, temperature = 3000, 2.0
    hidden = torch.zeros(1, 8, 8, dtype=torch.bool)
    hidden[:, 2:6, 4:6] = True
    plan = decoding_plan(*hidden_patches(hidden, (4, 4)), keys=KEYS.of(torch.tensor([0])), turn=0)
    with torch.no_grad():
        expected = (MODEL(IDS[:1], plan) / temperature).double().softmax(dim=1)[0, :, 3, 5] * copies
    many = Keys(0, 0, torch.arange(copies))
    repeated = IDS[:1].expand(copies, -1, -1), hidden.expand(copies, -1, -1)
    drawn = fill_iteratively(MODEL, *repeated, keys=many, rounds=1, temperature=temperature)[:, 3, 5]
    counts, common = torch.bincount(drawn, minlength=CODES), expected > 5
    assert common.sum() > 5
    pooled = [torch.cat([part[common], part[~common].sum().view(1)]) for part in (counts, expected)]
    assert stats.chisquare(*(part.numpy() for part in pooled)).pvalue > 1e-3


def test_noise_on_the_order_falls_with_the_rounds() -> None:
    """Gumbel-max: round t of T shows a patch with the odds exp(confidence / (temperature (1 - t / T)))."""
    copies, rounds = 3000, 4
    hidden = torch.zeros(copies, 8, 8, dtype=torch.bool)
    hidden[:, 2:6, 2:6] = True
    calls = []
    handle = MODEL.register_forward_hook(lambda model, inputs, logits: calls.append((*inputs, logits)))
    many = Keys(0, 0, torch.arange(copies))
    fill_iteratively(MODEL, IDS[:1].expand(copies, -1, -1), hidden, keys=many, rounds=rounds, temperature=1.0)
    handle.remove()
    for turn, ((_, plan, logits), (ids, later, _)) in enumerate(pairwise(calls)):
        chosen = logits.log_softmax(dim=1).gather(1, ids.unsqueeze(1)).squeeze(1)
        confidence = chosen.unfold(1, 2, 2).unfold(2, 2, 2).mean(dim=(3, 4)).flatten(1).double()
        confidence = (confidence / (1 - (turn + 1) / rounds)).masked_fill(~plan.hidden, -torch.inf)
        expected = confidence.softmax(dim=1).sum(dim=0)
        shown = (plan.hidden & ~later.hidden).sum(dim=0)
        places = expected > 0
        assert places.sum() == 4 and shown[~places].sum() == 0 and shown.sum() == copies
        assert stats.chisquare(shown[places].numpy(), expected[places].numpy()).pvalue > 1e-3


def test_a_model_that_knows_one_image_fills_it_perfectly() -> None:
    """Trained for 300 steps as a pre-training run does."""
    law, ids = MASK_RATIOS["seitpp"], (IDS[:1] % 8).expand(4, -1, -1)
    torch.manual_seed(0)
    model = tiny_mtm(code_dim=16, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(300):
        noise = Keys(0, step, torch.arange(4)).uniform("mask", 16)
        plan = mask_plan(noise, *law.counts(16, law.ratio(0, step)))
        optimizer.zero_grad()
        masked_token_loss(model(ids, plan), ids, plan).backward()
        optimizer.step()
    for patches in (4, 9, 16):
        hidden = some_region(patches)
        given = torch.where(hidden, CODES - 1, ids)
        assert torch.equal(fill_iteratively(model.eval(), given, hidden, keys=KEYS), ids)


def test_bad_regions_and_settings_are_refused() -> None:
    whole = some_region()
    torn = whole.clone()
    torn[2, 0, 0] = ~torn[2, 0, 0]
    with pytest.raises(DecodingError, match="parts of patches, expected whole patches of 2 x 2 tokens"):
        fill_iteratively(MODEL, IDS, torn, keys=KEYS)
    uneven = torch.cat([whole[:2], some_region(5)[2:]])
    with pytest.raises(DecodingError, match=r"\[5, 9\] hidden patches per image, expected the same number"):
        fill_iteratively(MODEL, IDS, uneven, keys=KEYS)
    with pytest.raises(DecodingError, match=r"\[0\] hidden patches"):
        fill_iteratively(MODEL, IDS, torch.zeros_like(whole), keys=KEYS)
    for settings in ({"rounds": 0}, {"temperature": -1.0}):
        with pytest.raises(DecodingError, match="expected 1 round or more, and a temperature >= 0"):
            fill_iteratively(MODEL, IDS, whole, keys=KEYS, **settings)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The file of an untrained model for the digits."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_pretrained(path, MODEL, codebook_fingerprint(TokenStore(digits().store).codebook))
    return path


def test_smoke_through_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished = run("inpaint", "smoke", "--checkpoint", checkpoint, "--out", out)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((out / "result.json").read_text())
    chosen = torch.arange(32) * 360 // 32
    ids = torch.from_numpy(TokenStore(digits().store, "validation").ids(chosen.numpy())).long()
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[:, 2:6, 2:6] = True
    keys = Keys(0, 0, chosen)
    plan = decoding_plan(*hidden_patches(hidden, (4, 4)), keys=keys, turn=0)
    with torch.no_grad():
        logits = MODEL(ids, plan)
    right = [
        fill_hidden(logits, ids, plan) == ids,
        fill_iteratively(MODEL, ids, hidden, keys=keys, rounds=2) == ids,
    ]
    for name, correct in zip(("one_shot", "iterative"), right, strict=True):
        assert result[f"accuracy_{name}"] == pytest.approx(100 * correct[hidden].float().mean().item())
    most = torch.bincount(ids[:, 2:6, 2:6].flatten()).max().item()
    assert result["accuracy_one_code"] == pytest.approx(100 * most / (32 * 16))
    assert result["loss"] == pytest.approx(masked_token_loss(logits, ids, plan).item(), rel=1e-5)
    assert (out / "inpainting.png").read_bytes().startswith(b"\x89PNG")


def test_region_is_rounded_to_patches() -> None:
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[2:6, 6:12] = True
    assert torch.equal(inpaint.region_tokens((0.3, 0.5, 0.4, 0.5), (8, 12), (4, 6)), expected)
    assert inpaint.region_tokens((0.0, 0.0, 1.0, 1.0), (8, 12), (4, 6)).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"region": (0.5, 0.0, 0.6, 1.0)}, "--region 0.5 0.0 0.6 1.0 of 4 x 4 patches: expected top, left"),
        ({"region": (-0.1, 0.0, 0.5, 1.0)}, "--region -0.1"),
        ({"region": (0.0, 0.5, 0.5, 0.1)}, "at least one patch"),
        ({"rounds": 0}, "0 rounds at temperature 0.0"),
        ({"images": 0}, "--images 0"),
        ({"checkpoint": None}, "--checkpoint"),
        ({"checkpoint": "none.safetensors"}, "no model file at none.safetensors"),
        ({"preset": "published"}, "needs --store"),
    ],
    ids=str,
)
def test_bad_settings_make_no_folder(changes, words, checkpoint: Path, tmp_path: Path) -> None:
    config = replace(inpaint.PRESETS["smoke"], checkpoint=str(checkpoint), out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=re.escape(words)):
        inpaint.main(replace(config, **changes))
    assert not (tmp_path / "run").exists()


def test_other_models_and_codebooks_are_refused(tmp_path: Path) -> None:
    store = TokenStore(digits().store)
    classifier = timm.create_model("mtm_vit_nano", img_size=8, in_chans=16, num_codes=CODES, num_classes=10)
    save_classifier(tmp_path / "classifier", classifier, None, class_names=None)
    save_pretrained(tmp_path / "other", MODEL, "0" * 64)
    larger = tiny_mtm(grid=(10, 10), code_dim=16)
    save_pretrained(tmp_path / "larger", larger, codebook_fingerprint(store.codebook))
    for name, words in {"classifier": "no masked", "other": "codebook", "larger": r"grid \(8, 8\)"}.items():
        with pytest.raises(UserError, match=words):
            inpaint.open_model(str(tmp_path / name), store)
