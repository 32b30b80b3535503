"""The page that a run leaves: what is in it, that strangers' names do no harm, and how a browser shows it."""

import dataclasses
import html
import importlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.paths import RECIPES

from seitpp import plots
from seitpp.engine.config import Choice, parse
from seitpp.engine.repeat import OF_ONE_RUN, PRESET, command, origins
from seitpp.engine.report import STYLE, Picture, Report, Shown, Table, Written, page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RECIPES_OF_RUNS = [path.stem for path in sorted(RECIPES.glob("*.py")) if path.stem != "tokenize_images"]
HOSTILE = '</td><script src="https://example.org/x.js">&amp;"' + "'" + "-and_a_name_without_a_space" * 8
VOID = {"meta", "img", "wbr"}
# What a text and what is behind it are called in the style.
ON = [(text, ground) for text in ("text", "quiet", "accent") for ground in ("ground", "panel")]


def png(width: int, height: int) -> bytes:
    data = BytesIO()
    Image.new("RGB", (width, height), "white").save(data, "PNG")
    return data.getvalue()


def hostile_page() -> str:
    """A report whose every text is a stranger's, with wide tables and plots."""
    rows = torch.rand(6, 3, 8, 8)
    shown = [
        Shown(HOSTILE, HOSTILE, [Picture(png(2000, 500), HOSTILE, inches=14.0)], HOSTILE),
        plots.shown_rows({HOSTILE: list(rows)}, Path(HOSTILE), HOSTILE, text=HOSTILE),
    ]
    wide = Table(HOSTILE, [HOSTILE] * 20, [[HOSTILE, *range(19)], [HOSTILE, *[None] * 18, 1.5]], ["#aa0000"] * 2)
    written = Written(
        HOSTILE,
        {"top1": 86.9, HOSTILE: 3, "findings": [HOSTILE]},
        {"data": {"fingerprint": "f" * 64, HOSTILE: [HOSTILE]}},
        {"seconds": 3.5, "device": HOSTILE},
        {
            "store": Choice(HOSTILE, "named"),
            HOSTILE: Choice(("a", 1), HOSTILE),
            "workers": Choice(2, "by the CPU cores"),
        },
        shlex.join(["python", "recipes/probe.py", "--store", HOSTILE]),
    )
    return page(Report(HOSTILE, [HOSTILE, HOSTILE], shown, [wide]), written)


class Structure(HTMLParser):
    """The tags of a page with their attributes, its text, and whether each tag is closed in its place."""

    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.declared = ""

    def handle_decl(self, decl: str) -> None:
        self.declared = decl

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def structure(text: str) -> Structure:
    found = Structure()
    found.feed(text)
    found.close()
    assert found.open == []
    return found


def test_a_page_is_html_that_a_stranger_cannot_change() -> None:
    found = structure(hostile_page())
    tags = [tag for tag, _ in found.tags]
    assert found.declared == "doctype html" and tags[:3] == ["html", "head", "meta"]
    assert dict(found.tags)["html"] == {"lang": "en"} and ("meta", {"charset": "utf-8"}) in found.tags
    assert any(attributes.get("name") == "viewport" for _, attributes in found.tags)
    assert "script" not in tags and "link" not in tags and tags.count("h1") == 1
    assert found.text.count(HOSTILE) > 10, "escaped, not left out"
    for tag, attributes in found.tags:
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,") and attributes["alt"]
        assert not any(name.startswith("on") or name == "href" for name in attributes)
    assert not re.search(r"url\(|@import|@font-face", STYLE)


def test_a_page_goes_from_figures_to_the_origin() -> None:
    text = structure(hostile_page()).text
    places = [
        text.index(part) for part in ("86.90 %", "Data", "Settings", "Repeat this run", "Versions and duration")
    ]
    assert places == sorted(places)
    assert "by the CPU cores" in text and "python" in text[places[-1] :] and "torch" in text[places[-1] :]


def test_rows_of_images_keep_their_pixels_and_colors() -> None:
    images = [torch.rand(3, 8, 8), torch.rand(1, 4, 6)]
    shown = plots.shown_rows({"tokens": images}, Path("x.png"), "Images", text="as they are")
    (picture,) = shown.pictures
    with Image.open(BytesIO(picture.png)) as drawn:
        assert drawn.size == (18, 8) and drawn.mode == "RGBA"
        pixels = np.asarray(drawn)
    np.testing.assert_array_equal(pixels[:, :8, :3], (images[0].permute(1, 2, 0) * 255).round().byte().numpy())
    assert pixels[0, 9, 3] == 0 and pixels[4, 13, 3] == 255, "around a smaller image nothing is drawn"
    assert picture.crisp and picture.alt == "tokens: 2 images side by side"


@pytest.fixture
def from_a_command_line() -> Iterator[None]:
    token = PRESET.set(None)
    yield
    PRESET.reset(token)


def of_the_run(config: object) -> dict:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in OF_ONE_RUN}


@pytest.mark.parametrize("recipe", RECIPES_OF_RUNS)
def test_the_command_repeats_the_settings(recipe: str, from_a_command_line) -> None:
    presets = importlib.import_module(recipe).PRESETS
    for name, preset in presets.items():
        config = dataclasses.replace(preset, seed=7, out="--out of the way")
        for started in (preset, None):
            PRESET.set(started)
            line = command(recipe, config, processes=1)
            words = shlex.split(line)
            assert words[:3] == ["python", f"recipes/{recipe}.py", name]
            assert of_the_run(parse(presets, name, words[2:])) == of_the_run(config), line
            if started:
                assert words[3:] == ["--seed", "7"]


def test_the_command_names_what_was_chosen_and_a_page_says_why(from_a_command_line) -> None:
    presets = importlib.import_module("mtm_pretrain").PRESETS
    config = dataclasses.replace(presets["auto"], store="it's mine", crop_size=(8, 16), trackers=("wandb",))
    PRESET.set(presets["auto"])
    chosen = {"epochs": Choice(400, "as published"), "workers": Choice(2, "by the CPU cores")}
    line = command("mtm_pretrain", config, processes=2, chosen=chosen, accumulation=4)
    assert line.startswith("accelerate launch --num_processes 2 recipes/mtm_pretrain.py auto ")
    words = shlex.split(line)
    assert words[words.index("--epochs") + 1] == "400", "though it is the preset's"
    parsed = parse(presets, "auto", words[words.index("auto") :])
    assert of_the_run(parsed) == of_the_run(dataclasses.replace(config, accumulation=4))
    assert "--workers" not in words, "another machine has other cores"
    rows = origins(config, chosen)
    assert rows["epochs"] == (400, "as published") and rows["workers"] == (2, "by the CPU cores")
    assert rows["store"][1].startswith("named") and rows["base_lr"][1] == "" and "out" not in rows
    assert [bool(why) for _, why in rows.values()] == sorted((bool(why) for _, why in rows.values()), reverse=True)


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def schemes() -> list[dict[str, str]]:
    """The named colors of the style, in light and in dark."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in blocks)
    assert light.keys() == dark.keys()
    return [light, dark]


@pytest.mark.parametrize("scheme", schemes(), ids=["light", "dark"])
def test_every_text_can_be_read(scheme: dict[str, str]) -> None:
    for text, ground in ON:
        bright, dim = sorted((luminance(scheme[text]), luminance(scheme[ground])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, ground)
    assert set(re.findall(r"[{;] ?color: var\(--(\w+)\)", STYLE)) <= {text for text, _ in ON}
    assert {*re.findall(r"background: var\(--(\w+)\)", STYLE)} == {ground for _, ground in ON}


def browse(*flags: str) -> str:
    """What headless Chromium prints."""
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_shows_it_on_a_phone_and_on_a_screen_in_light_and_dark(tmp_path: Path) -> None:
    """Nothing makes the page wider than the window; what is wide scrolls in its own box."""
    text = hostile_page()
    frames = "".join(
        f'<iframe width={width} height=900 style="border: 0" srcdoc="{html.escape(text)}"></iframe>'
        for width in (1280, 420)
    )
    measure = """<script>onload = () => document.title = [...document.querySelectorAll("iframe")].map(frame => {
        const page = frame.contentDocument, boxes = [...page.querySelectorAll(".scroll")];
        return [page.documentElement.scrollWidth, boxes.filter(box => box.scrollWidth > box.clientWidth).length,
                Math.min(...[...page.querySelectorAll("img")].map(image => image.clientWidth))].join(" ");
    }).join(", ")</script>"""
    (tmp_path / "frames.html").write_text(f"<!doctype html><title>none</title>{frames}{measure}")
    dumped = browse("--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/frames.html")
    title = re.search(r"<title>(.*?)</title>", dumped).group(1)
    (screen, wide, image), (phone, narrow, small) = (map(int, part.split()) for part in title.split(", "))
    assert (screen, phone) == (1280, 420), "no horizontal overflow"
    assert wide >= 1 and narrow >= 2 and image > 800 and 300 < small < 420
    (tmp_path / "report.html").write_text(text)
    for number, scheme in ((1, "light"), (0, "dark")):
        file = tmp_path / f"{scheme}.png"
        flags = f"--blink-settings=preferredColorScheme={number}", f"--screenshot={file}", "--window-size=420,300"
        browse(*flags, f"file://{tmp_path}/report.html")
        with Image.open(file) as drawn:
            seen = "#{:02x}{:02x}{:02x}".format(*drawn.convert("RGB").getpixel((2, 2)))
        assert seen == schemes()[scheme == "dark"]["ground"]
