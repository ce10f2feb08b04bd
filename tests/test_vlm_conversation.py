"""Token ids and label masks of conversations, against arrays written by hand and transformers' own processors."""

import copy
from typing import Any

import pytest
import torch
import vlm_models
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from openvision3.config import OpenVisionError
from openvision3.vlm.assemble import add_image_token, assemble, calibrate_projector, open_tower, rms
from openvision3.vlm.config import VLMDataConfig
from openvision3.vlm.conversation import IMAGE, VICUNA_TEMPLATE, UnusableConversation, encode, encode_apart, render
from openvision3.vlm.data import Collate, Conversation, EncodedConversations, picture_tokens
from openvision3.vlm.train import loss_sum


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    return vlm_models.save_tower(folder / "tower"), vlm_models.save_language_model(folder / "lm")


def built(folders, kind="llava", tiles=((1, 2), (2, 1), (2, 2))):
    tower, language_model = folders
    return assemble(
        open_tower(str(tower)), LlamaForCausalLM.from_pretrained(language_model), vlm_models.tokenizer(), kind, tiles
    )


@pytest.fixture(scope="module")
def words(folders):
    found = vlm_models.tokenizer()
    add_image_token(found, LlamaForCausalLM.from_pretrained(folders[1]))
    return found


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def pieces(words, found):
    return words.convert_ids_to_tokens(found.ids), [
        word if label >= 0 else "."
        for word, label in zip(words.convert_ids_to_tokens(found.ids), found.labels, strict=True)
    ]


def test_one_turn(words):
    found = encode(words, [user(f"{IMAGE}\nhow many"), answer("one key")], [2], 100)
    tokens, learned = pieces(words, found)
    assert tokens.count(IMAGE) == 2 and tokens[-3:] == ["one", "key", "[EOS]"]
    assert learned == ["."] * (len(tokens) - 3) + ["one", "key", "[EOS]"]


def test_literal_arrays(words):
    """Two turns and two pictures: every id and label, written out."""
    ids = {word: words.convert_tokens_to_ids(word) for word in ("[BOS]", "[EOS]", IMAGE, "one", "two", "three", "key")}
    role = {name: words(f"{name} : ", add_special_tokens=False)["input_ids"] for name in ("user", "assistant")}
    b, e, i = ids["[BOS]"], ids["[EOS]"], ids[IMAGE]
    found = encode(words, [user(f"{IMAGE}{IMAGE} key"), answer("two key"), user("one"), answer("three")], [3, 1], 100)
    expected = [b, *role["user"], i, i, i, i, ids["key"], e, b, *role["assistant"], ids["two"], ids["key"], e]
    expected += [b, *role["user"], ids["one"], e, b, *role["assistant"], ids["three"], e]
    assert found.ids == expected
    skip, u, a = -100, len(role["user"]), len(role["assistant"])
    labels = [skip] * (1 + u + 4 + 2 + 1 + a) + [ids["two"], ids["key"], e]
    labels += [skip] * (1 + u + 2 + 1 + a) + [ids["three"], e]
    assert found.labels == labels

    at = 1 + u + 4 + 2 + 1 + a + 2  # within the first answer
    cut = encode(words, [user(f"{IMAGE}{IMAGE} key"), answer("two key"), user("one"), answer("three")], [3, 1], at)
    assert cut.ids == expected[:at] and cut.labels == labels[:at] and cut.labels[-1] == ids["key"]


def test_vicunas_form(words):
    """LLaVA-1.5's text of a conversation (its `conv_vicuna_v1`), written out; what is learned of it."""
    words = copy.deepcopy(words)
    words.chat_template = VICUNA_TEMPLATE
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    said = [user("key one"), answer("two"), user("how many"), answer("three")]
    whole = f"[BOS]{system} USER: key one ASSISTANT: two[EOS]USER: how many ASSISTANT: three[EOS]"
    assert render(words, said) == whole
    assert render(words, said[:3], True) == f"[BOS]{system} USER: key one ASSISTANT: two[EOS]USER: how many ASSISTANT:"
    assert render(words, [{"role": "system", "content": "Be short."}, *said[:1]]) == "[BOS]Be short. USER: key one "
    _, learned = pieces(words, encode(words, said, [], 1000))
    assert [piece for piece in learned if piece != "."] == ["two", "[EOS]", "three", "[EOS]"]


def test_what_a_template_refuses_is_unusable():
    strict = vlm_models.tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UnusableConversation, match="refuses it: roles must alternate"):
        encode(strict, [user("key"), user("one")], [], 100)


def test_plain(words):
    found = encode(words, [user(f"what is it ?\n{IMAGE}"), answer("one key")], [3], 100, "plain")
    i = words.convert_tokens_to_ids(IMAGE)
    learned = [words.convert_tokens_to_ids(word) for word in ("one", "key", "[EOS]")]
    assert found.ids[-6:] == [i, i, i, *learned]
    assert found.labels == [-100] * (len(found.ids) - 3) + learned


def test_unusable(words):
    turns = [user(f"{IMAGE} key"), answer("one")]
    for pictures, length, said in (
        ([], 100, "hold 1 of <image>, its pictures are 0"),
        ([2, 2], 100, "its pictures are 2"),
        ([50], 20, "beyond max_length 20"),
        ([2], 8, "no answer is left"),
    ):
        with pytest.raises(UnusableConversation, match=said):
            encode(words, turns, pictures, length)
    with pytest.raises(UnusableConversation, match="an answer holds"):
        encode(words, [user("key"), answer(IMAGE)], [1], 100)
    with pytest.raises(UnusableConversation, match="no answer"):
        encode(words, [user("key")], [], 100)
    forgetful = vlm_models.tokenizer()
    forgetful.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(OpenVisionError, match="from left to right"):
        encode(forgetful, [user("key"), answer("one"), user("two"), answer("three")], [], 100)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_as_transformers(folders, kind):
    """Ids, pictures and the number of tokens of each are those of transformers' processor."""
    vlm = built(folders, kind)
    pictures = [Image.new("RGB", (70, 40), (200, 10, 10)), Image.new("RGB", (32, 96), (10, 200, 10))]
    for some in ([pictures[0]], pictures):
        content = [{"type": "image"}] * len(some) + [{"type": "text", "text": "how many"}]
        prompt = vlm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        theirs = vlm.processor(images=some, text=prompt, return_tensors="pt", add_special_tokens=False)
        messages = [user(f"{IMAGE}\n" * len(some) + "how many"), answer("two")]
        data = EncodedConversations(None, [], vlm.processor, 500, VLMDataConfig())  # type: ignore[arg-type]
        ours = data.encoded(Conversation("k", messages, some))
        length = theirs["input_ids"].shape[1]
        assert ours["input_ids"][:length].tolist() == theirs["input_ids"][0].tolist()
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        assert (ours["labels"][:length] == -100).all() and (ours["labels"][length:] >= 0).all()
        batch = Collate(vlm.processor)([ours, ours])
        batch.pop("bad")
        logits = vlm.model(**{**batch, "logits_to_keep": 0, "labels": None}).logits
        assert logits.shape[:2] == batch["input_ids"].shape


def test_turns_apart(words):
    """Literal ids: the picture and what is before it once, then each turn, counted on from where the picture ends."""
    said = [user(f"{IMAGE}\nhow many"), answer("two"), user("key"), answer("one")]
    whole = [
        encode(words, [user(f"{IMAGE}\n{question}"), answer(text)], [3], 100)
        for question, text in (("how many", "two"), ("key", "one"))
    ]
    found = encode_apart(words, said, [3], 100)
    shared = found.turns.count(0)
    assert found.ids == [*whole[0].ids, *whole[1].ids[shared:]]
    assert found.labels == [*whole[0].labels, *whole[1].labels[shared:]]
    first, second = len(whole[0].ids) - shared, len(whole[1].ids) - shared
    assert found.turns == [0] * shared + [1] * first + [2] * second
    assert found.positions() == [*range(shared + first), *range(shared, shared + second)]
    image = words.convert_tokens_to_ids(IMAGE)
    assert found.ids[:shared].count(image) == found.ids.count(image) == 3
    cut = encode_apart(words, said, [3], len(found.ids) - 1)
    assert (cut.ids, cut.labels) == (whole[0].ids, whole[0].labels) and set(cut.turns) == {0, 1}
    alone = encode_apart(words, said[:2], [3], 100)
    assert alone == whole[0]
    with pytest.raises(UnusableConversation, match="by turns"):
        encode_apart(words, said[:3], [3], 100)
    with pytest.raises(UnusableConversation, match="after the first question"):
        encode_apart(words, [*said[:2], user(f"{IMAGE}\nkey"), answer("one")], [3, 3], 100)


def test_turns_apart_are_conversations_of_their_own(folders):
    """The same loss and gradients as each turn in a conversation alone; batched with a text and padding too."""
    vlm = built(folders)
    picture = Image.new("RGB", (32, 32), (200, 10, 10))
    turns = [("how many", "two"), ("is the key small", "yes"), ("where", "by the water")]
    said = [message for question, text in turns for message in (user(question), answer(text))]
    said[0] = user(f"{IMAGE}\n{turns[0][0]}")
    singles = [Conversation("k", [user(f"{IMAGE}\n{question}"), answer(text)], [picture]) for question, text in turns]
    texts = Conversation("t", [user("one"), answer("two"), user("three"), answer("one two")], [])
    text_singles = [Conversation("t", texts.messages[n : n + 2], []) for n in (0, 2)]
    results = []
    for apart, rows in ((True, [Conversation("k", said, [picture]), texts]), (False, singles + text_singles)):
        data = EncodedConversations(None, [], vlm.processor, 500, VLMDataConfig(apart=apart))  # type: ignore[arg-type]
        vlm.model.zero_grad()
        total = 0.0
        for batch in [rows] if apart else [[row] for row in rows]:
            made = Collate(vlm.processor)([data.encoded(row) for row in batch])
            assert not made.pop("bad")
            loss = loss_sum(vlm.model, made)
            loss.backward()
            total += loss.item()
        weights = vlm.model.named_parameters()
        results.append((total, {name: w.grad.clone() for name, w in weights if w.grad is not None}))
    (ours, gradients), (theirs, expected) = results
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert gradients.keys() == expected.keys() and len(gradients) > 10
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-5, rtol=1e-4)


def test_tiles_change_the_number_of_tokens(folders):
    vlm = built(folders, "llava_next")
    wide, square = Image.new("RGB", (64, 32)), Image.new("RGB", (32, 32))
    counts = []
    for picture in (wide, square):
        made = dict(vlm.processor.image_processor([picture], return_tensors="pt"))
        counts += picture_tokens(vlm.processor, [picture], made)
    assert counts[0] == 4 + 2 * (4 + 1)  # the whole, and two rows of four with a token that ends each
    assert counts[1] != counts[0]


def foreign_tower(folder, kind):
    """A tiny CLIP or SigLIP vision model with its image processor: 4 tokens, and CLIP's class token."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    sizes |= {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    if kind == "clip":
        model, images = CLIPVisionModel(CLIPVisionConfig(**sizes)), CLIPImageProcessor
    else:
        model, images = SiglipVisionModel(SiglipVisionConfig(**sizes)), SiglipImageProcessor
    model.save_pretrained(folder)
    images(size={"shortest_edge": 32} if kind == "clip" else {"height": 32, "width": 32}).save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_towers_of_transformers(folders, tmp_path, kind):
    """CLIP's last state but one without the class token, as LLaVA; SigLIP's last, whole; with their own colours."""
    tower = foreign_tower(tmp_path, kind)
    vlm = built((tmp_path, folders[1]))
    picture = Image.new("RGB", (32, 32), (200, 10, 90))
    data = EncodedConversations(None, [], vlm.processor, 500, VLMDataConfig())  # type: ignore[arg-type]
    ours = data.encoded(Conversation("k", [user(f"{IMAGE}\nhow many"), answer("two")], [picture]))
    prompt = vlm.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many"}]}],
        add_generation_prompt=True,
    )
    theirs = vlm.processor(images=picture, text=prompt, return_tensors="pt", add_special_tokens=False)
    length = theirs["input_ids"].shape[1]
    assert ours["input_ids"][:length].tolist() == theirs["input_ids"][0].tolist()
    seen = []
    vlm.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        vlm.model(input_ids=ours["input_ids"][None], pixel_values=ours["pixel_values"])
        states = tower(ours["pixel_values"], output_hidden_states=True).hidden_states
    expected = states[-2][:, 1:] if kind == "clip" else states[-1]
    assert expected.shape[1] == 4
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)
    scale = (200 / 255 - 0.48145466) / 0.26862954 if kind == "clip" else 2 * 200 / 255 - 1
    assert ours["pixel_values"][0, 0].mean().item() == pytest.approx(scale, abs=1e-4)


def test_a_new_projector_is_as_large_as_the_text(folders):
    vlm = built(folders)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    text = rms(vlm.model.get_input_embeddings().weight)

    def made():
        with torch.no_grad():
            return rms(torch.cat(list(vlm.model.model.get_image_features(pixels).pooler_output)))

    before = made()
    calibrate_projector(vlm.model, pixels)
    assert abs(before / text - 1) > 0.5
    torch.testing.assert_close(made(), text, rtol=1e-3, atol=0)


def test_open_answer(words):
    assert render(words, [user("key")], open_answer=True).endswith("[BOS]assistant : ")
