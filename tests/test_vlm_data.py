"""Conversations from LLaVA's JSON, with a folder or tars of pictures, and from scenes; their order and batches."""

import io
import json
import random
import tarfile
from collections import Counter

import numpy as np
import pytest
import vlm_models
from PIL import Image

from openvision3.config import OpenVisionError, SceneConfig
from openvision3.data import demo, grammar
from openvision3.vlm.conversation import IMAGE, UnusableConversation
from openvision3.vlm.data import JsonConversations, SceneConversations, order, scene_questions


@pytest.fixture
def data(tmp_path):
    entries = [(1, ["how many", "one key"]), (0, ["one", "two three four"]), (2, ["key", "two", "one", "three"])]
    return vlm_models.save_data(tmp_path / "data", entries)


def test_json(data):
    found = JsonConversations(data, str(data.parent / "pictures"))
    assert len(found) == 3 and [found.pictures(n) for n in range(3)] == [1, 0, 2]
    first, second, third = (found.read(n) for n in range(3))
    assert first.messages == [
        {"role": "user", "content": f"{IMAGE}\nhow many"},
        {"role": "assistant", "content": "one key"},
    ]
    assert second.pictures == [] and len(third.pictures) == 2 and third.messages[3]["content"] == "three"
    assert np.array_equal(np.asarray(third.pictures[1]), np.asarray(Image.open(data.parent / "pictures" / "2-1.png")))
    assert found.words(1) == 4


def test_pictures_that_no_text_places_stand_first(data):
    entries = json.loads(data.read_text())
    entries[0]["conversations"][0]["value"] = "how many"
    data.write_text(json.dumps(entries))
    found = JsonConversations(data, str(data.parent / "pictures")).read(0)
    assert found.messages[0]["content"] == f"{IMAGE}\nhow many"


def test_an_answer_that_nobody_asked_for_is_left_out(data):
    """Some of ShareGPT's begin with one; LLaVA leaves it out, too."""
    entries = json.loads(data.read_text())
    entries[1]["conversations"].insert(0, {"from": "gpt", "value": "go on"})
    whole = JsonConversations(data, str(data.parent / "pictures")).read(1)
    data.write_text(json.dumps(entries))
    assert JsonConversations(data, str(data.parent / "pictures")).read(1).messages == whole.messages


def test_tars(data, tmp_path):
    """Pictures by their names in tars are those of the folder, in folders of the tar too."""
    for number, names in enumerate((["0-0.png", "2-0.png"], ["2-1.png"])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name in names:
                tar.add(data.parent / "pictures" / name, f"a/{name}")
    entries = json.loads(data.read_text())
    for entry in entries:
        if isinstance(entry.get("image"), list):
            entry["image"] = [f"a/{name}" for name in entry["image"]]
        elif "image" in entry:
            entry["image"] = f"a/{entry['image']}"
    inside = data.parent / "tars.json"
    inside.write_text(json.dumps(entries))
    folder, tars = (
        JsonConversations(path, images)
        for path, images in ((data, str(data.parent / "pictures")), (inside, str(tmp_path / "{0..1}.tar")))
    )
    for number in range(3):
        a, b = folder.read(number), tars.read(number)
        assert [np.asarray(x).tobytes() for x in a.pictures] == [np.asarray(x).tobytes() for x in b.pictures]
    entries[0]["image"] = "a/none.png"
    inside.write_text(json.dumps(entries))
    with pytest.raises(UnusableConversation, match="in none of the tars"):
        JsonConversations(inside, str(tmp_path / "{0..1}.tar")).read(0)


@pytest.mark.parametrize("name", ["../data.json", "/etc/hostname", "a/../../x.png"])
def test_outside(data, name):
    entries = json.loads(data.read_text())
    entries[0]["image"] = name
    data.write_text(json.dumps(entries))
    with pytest.raises(UnusableConversation, match="entry 0.*lies outside"):
        JsonConversations(data, str(data.parent / "pictures")).read(0)


def test_broken(data, tmp_path):
    pictures = str(data.parent / "pictures")
    (data.parent / "pictures" / "0-0.png").write_bytes(b"no picture")
    with pytest.raises(UnusableConversation, match="entry 0"):
        JsonConversations(data, pictures).read(0)
    for text, said in (("{", "is no JSON"), ("[]", "at least one"), ('{"a": 1}', "list of conversations")):
        data.write_text(text)
        with pytest.raises(OpenVisionError, match=said):
            JsonConversations(data, pictures)
    data.write_text('[{"image": "2-0.png", "conversations": [{"from": "robot", "value": "x"}]}]')
    with pytest.raises(UnusableConversation, match="expected"):
        JsonConversations(data, pictures).read(0)
    with pytest.raises(OpenVisionError, match="can't read"):
        JsonConversations(tmp_path / "none.json", pictures)


def test_scenes():
    """What is said of a scene is true of it, and presence is asked for in vain as often as not."""
    kinds = Counter()
    for number in range(60):
        scene = demo.scene(SceneConfig(), "train", 0, number)
        asked = scene_questions(scene, random.Random(number), demo.names(100))
        groups = Counter(thing.name for thing in scene.things)
        answers = {question: answer for question, answer in asked}
        assert len(answers) == len(asked)
        presence = [answer for question, answer in asked if question.startswith("Is there")]
        assert presence.count("yes") == presence.count("no") == len(groups)
        vain = [question for question, answer in asked if question.startswith("Is there") and answer == "no"]
        assert set(vain) <= {grammar.presence_question(name) for name in demo.names(100)}
        for name, count in groups.items():
            assert answers[grammar.presence_question(name)] == "yes"
            assert answers[grammar.count_question(name)] == grammar.NUMBERS[count - 1]
        for a, relation, b in grammar.statable_relations(scene):
            for word, truth in ((relation, "yes"), (grammar.OPPOSITE[relation], "no")):
                kinds[truth] += (found := answers.get(grammar.relation_question(a, word, b))) is not None
                assert found in (None, truth)
        assert answers[grammar.CAPTION_QUESTION] == grammar.captions(scene).caption
    assert kinds["yes"] > 10 and kinds["no"] > 10


def test_scene_conversations():
    found = SceneConversations(SceneConfig(), "questions", 32, 0, 10)
    one, again = found.read(3), found.read(3)
    assert one.messages == again.messages and one.pictures[0].size == (32, 32)
    assert one.messages[0]["content"].startswith(f"{IMAGE}\n") and found.pictures(3) == 1
    words = sum(len(m["content"].replace(IMAGE, "").split()) for m in one.messages)
    assert found.words(3) == words


def test_text_alone_needs_no_pictures(data):
    entries = json.loads(data.read_text())[1:2]
    data.write_text(json.dumps(entries))
    assert JsonConversations(data, "").read(0).pictures == []


def test_order():
    """Every conversation once an epoch, the seed's own way; a batch holds about one length."""
    found = SceneConversations(SceneConfig(), "questions", 32, 0, 64)
    numbers = order(found, 128, 8, 4, seed=1)
    assert sorted(numbers[:64]) == sorted(numbers[64:]) == list(range(64)) and numbers[:64] != numbers[64:]
    assert numbers == order(found, 128, 8, 4, seed=1) != order(found, 128, 8, 4, seed=2)
    spread = [np.std([found.words(n) for n in numbers[start : start + 8]]) for start in range(0, 64, 8)]
    assert np.mean(spread) < 0.5 * np.std([found.words(n) for n in range(64)])


def test_bytes_are_bounded(data, monkeypatch):
    monkeypatch.setattr("openvision3.vlm.data.MAX_JSON_BYTES", 10)
    with pytest.raises(OpenVisionError, match="larger than"):
        JsonConversations(data, str(data.parent))


def test_picture_of_a_bomb(data):
    """A picture that claims too many pixels is refused by its header."""
    file = io.BytesIO()
    Image.new("L", (16, 16)).save(file, format="PNG")
    raw = bytearray(file.getvalue())
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    (data.parent / "pictures" / "0-0.png").write_bytes(bytes(raw))
    with pytest.raises(UnusableConversation, match="entry 0"):
        JsonConversations(data, str(data.parent / "pictures")).read(0)
