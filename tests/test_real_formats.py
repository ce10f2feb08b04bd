"""docs/CLAIMS.md's commands, as they stand there but for sizes, on small data in the formats of the public sets."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import vlm_models
from encoder_folders import save_transformers
from PIL import Image
from small_tars import write_tar
from test_docs import ROOT, Block, blocks, commands, ov3_arguments

from openvision3 import cli
from openvision3.config import OpenVisionError
from openvision3.evaluation.samples import coco_captions, open_samples
from openvision3.training.monitor import read_records

SYNSETS = {  # ten of ImageNet's, with CLIP's names for them
    "n01440764": "tench", "n01443537": "goldfish", "n01484850": "great white shark", "n01491361": "tiger shark",
    "n02124075": "Egyptian Mau", "n02123045": "tabby cat", "n02504458": "African bush elephant",
    "n03792782": "mountain bike", "n07753592": "banana", "n15075141": "toilet paper",
}  # fmt: skip
COCO_IDS = (139, 285, 632, 724, 776)
SMALL_TRAIN = {
    **{f"model.{part}.{field}": value for part in ("encoder", "decoder", "text-encoder.transformer",
       "text-decoder.transformer") for field, value in (("width", 32), ("depth", 1), ("num-heads", 2))},
    "model.embed-dim": 16,
}  # fmt: skip
SHORT_TRAIN = {
    "stage1.resolution": 32, "stage1.samples": 8, "stage1.warmup-samples": 0, "stage1.batch-size": 4,
    "stage2.resolution": 32, "stage2.samples": 4, "stage2.warmup-samples": 0, "stage2.batch-size": 4,
    "stage2.lpips-weight": 0, "precision": "fp32", "micro-batch": 0, "compile": False, "checkpoint-blocks": False,
    "data.num-workers": 0, "log-every": 1, "eval-every": 0, "checkpoint-every": 0, "keep-every": 0,
    "background-saves": False, "model.vae.source": "kl", "device": "cpu",
}  # fmt: skip
SMALL_GENERATOR = {
    "generator.token-width": 32,
    "generator.backbone.width": 16, "generator.backbone.depth": 2, "generator.backbone.num-heads": 2,
    "generator.head.width": 32, "generator.head.depth": 1, "generator.head.num-heads": 2, "generator.num-classes": 10,
    "samples": 8, "batch-size": 4, "decay-samples": 0, "statistics-samples": 8, "precision": "fp32", "compile": False,
    "data.num-workers": 0, "log-every": 1, "sheet-every": 0, "sheet-steps": 1, "checkpoint-every": 0,
    "background-saves": False, "device": "cpu",
}  # fmt: skip


def documented() -> dict[str, list[list[str]]]:
    """What docs/CLAIMS.md gives to `ov3`, by the letters above the commands."""
    page = ROOT / "docs" / "CLAIMS.md"
    (block,) = [block for block in blocks(page) if block.text.startswith("# A: ")]
    _, *parts = re.split(r"^# ([A-Z](?:, [A-Z])*)\b.*\n", block.text, flags=re.MULTILINE)
    found = {}
    for letters, text in zip(parts[::2], parts[1::2], strict=True):
        arguments = [ov3_arguments(words) for words in commands(Block(page, block.line, "bash", text))]
        found[letters] = [words for words in arguments if words is not None]
    return found


COMMANDS = documented()


def shrunk(words: Sequence[str], names: Mapping[str, str], fields: Mapping[str, Any]) -> list[str]:
    """A command with names of what it is given in place of those of the page, and with other sizes at its end."""
    assert set(names) <= set(words), words
    added = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
    return [*(names.get(word, word) for word in words), *added]


def run(capsys: pytest.CaptureFixture[str], args: Sequence[str]) -> str:
    code = cli.main(list(args))
    out, err = capsys.readouterr()
    assert code == 0, f"{args}: {err}"
    return out


def jpeg(seed: int, width: int, height: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def save(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def imagenet(folder: Path) -> None:
    """The validation pictures in their synsets' folders; training pictures as webdataset's tars."""
    members: dict[str, bytes] = {}
    for i, synset in enumerate(SYNSETS):
        for k in range(2):
            save(
                folder / "imagenet-val" / synset / f"ILSVRC2012_val_{2 * i + k + 1:08d}.JPEG", jpeg(i, 100 - 10 * k, 75)
            )
            key = f"{synset}_{100 + k}"
            members |= {f"{key}.jpg": jpeg(100 + i, 80, 90), f"{key}.cls": b"%d" % i, f"{key}.json": b"{}"}
    (folder / "imagenet-train").mkdir()
    write_tar(folder / "imagenet-train" / "imagenet1k-train-0000.tar", members)


def coco(folder: Path) -> None:
    """Five pictures and their 25 captions, as annotations_trainval2017.zip has them."""
    images, annotations = [], []
    for i in COCO_IDS:
        save(folder / "coco-val" / f"{i:012d}.jpg", jpeg(i, 96, 64))
        images.append({"license": 2, "file_name": f"{i:012d}.jpg", "coco_url": "", "height": 64, "width": 96, "id": i})
        for k in range(5):
            caption = f"A picture of number {i} that is told in way {k}. "
            annotations.append({"image_id": i, "id": 10 * i + k, "caption": caption})
    annotations.append({"image_id": 139, "id": 9, "caption": "A picture of number 285 that is told in way 0."})
    found = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}
    (folder / "captions_val2017.json").write_text(json.dumps(found))


def recap(folder: Path) -> None:
    """A tar of Recap-DataComp-1B as img2dataset writes it, beside its own table of statistics."""
    members: dict[str, bytes] = {}
    for i in range(12):
        row = {
            "url": f"https://example.org/{i}.jpg", "re_caption": f"The image shows thing {i}. It is on a table.",
            "org_caption": f"thing {i} for sale", "caption": f"thing {i} for sale", "key": f"{i:09d}",
            "status": "success", "error_message": None, "width": 96, "height": 72, "original_width": 640,
            "original_height": 480, "exif": "{}", "sha256": "0" * 64,
        }  # fmt: skip
        members |= {f"{i:09d}.jpg": jpeg(i, 96, 72), f"{i:09d}.json": json.dumps(row).encode()}
        members[f"{i:09d}.txt"] = str(row["org_caption"]).encode()
    (folder / "recap").mkdir()
    write_tar(folder / "recap" / "00000.tar", members)
    (folder / "recap" / "00000_stats.json").write_text(json.dumps({"count": 12, "successes": 12}))


def llava(folder: Path) -> None:
    """Ten rows of LCS-558K and of LLaVA-665K: every source of pictures, several turns, text alone, an answer first."""
    rows = []
    for i in range(10):
        name = f"{i:05d}/{i:09d}.jpg"
        save(folder / "LCS-558K" / name, jpeg(i, 60, 80))
        asked = ["Render a clear and concise summary of the photo.\n<image>", "<image>\nWhat is this?"][i % 2]
        said = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"select luxury furniture {i} - inch"}]
        rows.append({"id": f"{i:09d}", "image": name, "conversations": said})
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows))
    names = [
        "coco/train2017/000000033471.jpg", "gqa/images/2354786.jpg", "ocr_vqa/images/140031996X.jpg",
        "textvqa/train_images/011e7e629fb9ae7b.jpg", "vg/VG_100K/2338865.jpg", "vg/VG_100K_2/2406003.jpg",
    ]  # fmt: skip
    mixed: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        save(folder / "llava-665k" / name, jpeg(50 + i, 90, 60))
        ask = "What are the colors of the bus in the image?\n<image>" if i % 2 else "<image>\nWho wrote this book?"
        texts = [ask, "white and red", "What feature can be seen on the back?", "an advertisement"]
        mixed.append({"id": Path(name).stem, "image": name, "conversations": turns(texts)})
    for i in range(3):
        texts = [f"How do I sort a list, case {i}?", "Call sort on it.", "And backwards?", "Pass reverse=True."]
        mixed.append({"id": f"wgByO4Y_{i}", "model": "", "conversations": turns(texts)})
    first = {"from": "gpt", "value": "Sure, go on."}  # some of ShareGPT's
    mixed.append({"id": "0YYQtkz_1", "model": "", "conversations": [first, *turns(["What is it?", "A list."])]})
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(mixed))


def turns(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder from which the commands run: data/ as the page names it, models where earlier commands leave them."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "data").mkdir()
    for make in (imagenet, coco, recap, llava):
        make(folder / "data")
    hf_models.diffusers_model().vae.autoencoder.save_pretrained(folder / "kl")  # type: ignore[union-attr]
    for name in ("paper_b16", "b16_1000_200"):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "model").symlink_to(tiny_model)
    return folder


@pytest.fixture(autouse=True)
def there(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(built)
    return built


def test_every_command_is_run_here_or_said_to_run_elsewhere() -> None:
    assert set(COMMANDS) == {"A", "B", "C", "P", "F", "R", "V", "G", "J", "H", "L, N", "Q"}
    for letters, count in {"R": 2, "G": 2, "H": 2, "L, N": 2, "Q": 5}.items():
        assert len(COMMANDS[letters]) == count


@pytest.mark.parametrize(
    "letter", ["A", pytest.param("B", marks=pytest.mark.slow), pytest.param("C", marks=pytest.mark.slow), "P"]
)
def test_training_on_recap_datacomp(letter: str, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = COMMANDS[letter]
    out = f"runs/trained-{letter}"
    run(capsys, shrunk(words, {"TARS": "data/recap"}, SMALL_TRAIN | SHORT_TRAIN | {"out": out}))
    rows = read_records(Path(out) / "metrics.jsonl")
    assert [row["samples_seen"] for row in rows] == [4, 8, 12] and all(row["bad_samples"] == 0 for row in rows)
    assert (Path(out) / "model" / "model.safetensors").exists()


def test_the_tar_is_whole_and_its_synthetic_caption_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    from openvision3.data.shards import TarSource
    from openvision3.recipes import paper_b16

    run(capsys, ["data", "check", "data/recap"])
    source = TarSource("data/recap", paper_b16().data, shuffle=False)
    sample = source.read(3)
    assert (sample.alt, sample.caption) == ("thing 3 for sale", "The image shows thing 3. It is on a table.")


@pytest.mark.slow
def test_a_decoder_on_clip(capsys: pytest.CaptureFixture[str], there: Path) -> None:
    (words,) = COMMANDS["F"]
    save_transformers(there / "clip", "clip", image_size=32, patch_size=16)
    fields = {f"model.decoder.{name}": value for name, value in (("width", 32), ("depth", 1), ("num-heads", 2))}
    args = shrunk(words, {"CLIP": "clip", "TARS": "data/recap"}, SHORT_TRAIN | fields | {"out": "runs/clip"})
    run(capsys, args)
    assert len(read_records(Path("runs/clip/metrics.jsonl"))) == 3


@pytest.mark.parametrize("number, count", [(0, 20), (1, 5)])
def test_reconstruction(number: int, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Of ImageNet's pictures and of COCO's; without Inception, whose weights tests/test_fidelity.py stands in for."""
    out = f"reconstruction-{number}.json"
    args = shrunk(COMMANDS["R"][number], {}, {"size": 64, "device": "cpu", "json": out})
    run(capsys, [*args, "--no-fidelity"])
    found = json.loads(Path(out).read_text())
    assert found["data"]["n"] == count and found["data"]["failed"] == 0
    assert 0 < found["reconstruction"]["psnr"] < 60 and 0 < found["reconstruction"]["vae_psnr"] < 60


def test_a_vae_alone(capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = COMMANDS["V"]
    names = {"black-forest-labs/FLUX.1-schnell": "kl"}
    run(capsys, [*shrunk(words, names, {"size": 64, "device": "cpu", "json": "vae.json"}), "--no-fidelity"])
    assert json.loads(Path("vae.json").read_text())["data"]["n"] == 20


def test_zero_shot_names_imagenets_synsets(capsys: pytest.CaptureFixture[str], there: Path, tmp_path: Path) -> None:
    samples = open_samples("data/imagenet-val", 32)
    assert dict(zip(sorted(SYNSETS), samples.labels, strict=True)) == SYNSETS
    assert [sample.label for sample in samples] == [i // 2 for i in range(20)]
    (tmp_path / "other" / "n00000001").mkdir(parents=True)  # no synset of the thousand
    (tmp_path / "other" / "n00000001" / "a.jpg").write_bytes(jpeg(0, 40, 40))
    assert open_samples(str(tmp_path / "other"), 32).labels == ("n00000001",)
    args = ["--model", "runs/paper_b16/model", "--data", "data/imagenet-val", "--device", "cpu", "--json", "z.json"]
    run(capsys, ["eval", "zeroshot", *args])
    found = json.loads(Path("z.json").read_text())["zeroshot"]
    assert (found["n"], found["labels"], found["templates"]) == (20, 10, 81)


def test_cocos_captions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Five a picture, one of them the same as another picture's: each looks for its picture."""
    captions = Path("data/captions_val2017.json")
    known = coco_captions(captions)
    assert len(known) == 5 and len(known["000000000139.jpg"]) == 6 and len(known["000000000285.jpg"]) == 5
    assert known["000000000632.jpg"][1] == "A picture of number 632 that is told in way 1."
    model = ["--model", "runs/paper_b16/model", "--device", "cpu"]
    data = [*model, "--data", "data/coco-val", "--captions", str(captions)]
    run(capsys, ["eval", "retrieval", *data, "--json", "r.json"])
    found = json.loads(Path("r.json").read_text())
    assert str(captions) in found["data"]["protocol"] and "several captions" in found["retrieval"]["protocol"]
    assert (found["retrieval"]["n"], found["retrieval"]["distinct_captions"]) == (5, 25)
    assert found["retrieval"]["ceiling_r1"] == pytest.approx((24 + 2 / 2) / 26)  # 26 captions, two of them alike
    assert found["retrieval"]["image_to_text_r10"] >= found["retrieval"]["image_to_text_r1"]
    assert cli.main(["eval", "retrieval", *model, "--captions", str(captions)]) == 2
    assert "are of a folder of pictures" in capsys.readouterr().err
    for text, said in (
        ('{"images": []}', "expected COCO's captions"),
        ('{"images": [], "annotations": []}', "none of"),
    ):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(OpenVisionError, match=said):
            open_samples("data/coco-val", 32, captions=tmp_path / "wrong.json")


@pytest.mark.slow
def test_generation_on_imagenets_classes(capsys: pytest.CaptureFixture[str]) -> None:
    """G, J and H: a generator, a weak one that guides it, another, and samples; scores are test_generate_eval.py's."""
    stats = ["--model", "runs/paper_b16/model", "--data.source", "data/imagenet-train", "--data.caption-field", ".cls"]
    run(capsys, ["generate", "stats", "stats.safetensors", *stats, "--samples", "20", "--device", "cpu"])
    for words in [*COMMANDS["G"], *COMMANDS["J"]]:
        out = Path(words[words.index("--out") + 1] if "--out" in words else f"runs/{words[2]}")
        run(capsys, shrunk(words, {}, SMALL_GENERATOR))
        assert [row["samples_seen"] for row in read_records(out / "metrics.jsonl")] == [4, 8]
    sample, score = COMMANDS["H"]
    few = {"num": 10, "per-class": 1, "steps": 2, "dtype": "fp32", "device": "cpu"}
    run(capsys, shrunk(sample, {}, few))
    with np.load(f"{score[2]}/samples.npz") as found:
        assert found["arr_0"].shape == (10, 64, 64, 3)


def test_llava(capsys: pytest.CaptureFixture[str], there: Path) -> None:
    """L, both stages, on a language model without a chat template, as Vicuna is; every row can be used."""
    words, _ = COMMANDS["L, N"]
    language_model = vlm_models.save_language_model(there / "lm")
    for path in (language_model / "chat_template.jinja", language_model / "tokenizer_config.json"):
        if path.suffix == ".jinja":
            path.unlink(missing_ok=True)
        elif path.exists():
            config = json.loads(path.read_text())
            config.pop("chat_template", None)
            path.write_text(json.dumps(config))
    fields = {f"stage{stage}.{name}": value for stage in (1, 2)
              for name, value in (("batch-size", 5), ("data.num-workers", 0))}  # fmt: skip
    fields |= {"language-model": language_model, "resolution": 64, "precision": "fp32", "micro-batch": 0,
               "checkpoint-blocks": False, "parallel": "ddp", "max-length": 512, "log-every": 1, "device": "cpu",
               "checkpoint-every": 0, "out": "runs/llava"}  # fmt: skip
    assert cli.main(shrunk(words, {}, fields)) == 0
    assert "has no chat template: it gets Vicuna's" in capsys.readouterr().err
    for stage in ("stage1", "stage2"):
        rows = [json.loads(line) for line in Path(f"runs/llava/{stage}/metrics.jsonl").read_text().splitlines()]
        assert not [row for row in rows if row["kind"] == "bad_sample"]
        losses = [row["loss"] for row in rows if row["kind"] == "train"]
        assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    saved = "".join(path.read_text() for path in sorted(Path("runs/llava/model").glob("*.j*")))
    assert "USER: " in saved and "ASSISTANT:" in saved
