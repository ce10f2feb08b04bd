"""Text towers: masks, cached decoding against uncached, beams against exhaustive search."""

import itertools

import pytest
import torch

from openvision3.config import AttentionPath, OpenVisionError, TextDecoderConfig, TextEncoderConfig, TransformerConfig
from openvision3.model import generate
from openvision3.model.generate import beam_search, greedy_search
from openvision3.model.prepacked import can_pack
from openvision3.model.text import CaptionDecoder, TextEncoder

PAD, BOS, EOS, CLS = 0, 1, 2, 3
SIZE = TransformerConfig(32, 2, 2)


def make_decoder(image_input, vocab_size=12, context_length=9, seed=0, image_positions=0.0):
    """A decoder whose weights are large enough for its choices to depend on picture and text."""
    torch.manual_seed(seed)
    config = TextDecoderConfig(SIZE, vocab_size, context_length, PAD, image_input, image_positions)
    decoder = CaptionDecoder(config, 24, "auto")
    for parameter in decoder.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return decoder.eval()


def make_encoder(path: AttentionPath = "auto") -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(TextEncoderConfig(SIZE, 20, 10, PAD), 16, path).eval()


def uncached_greedy(decoder, tokens, max_length):
    """One caption at a time, everything computed anew for each token."""
    rows = []
    for image in tokens:
        ids = [BOS]
        while len(ids) < max_length and ids[-1] != EOS:
            logits = decoder(image[None], torch.tensor([ids]))[0, -1].clone()
            logits[[PAD, BOS]] = -torch.inf
            ids.append(int(logits.argmax()))
        rows.append(ids)
    longest = max(map(len, rows))
    return [ids + [PAD] * (longest - len(ids)) for ids in rows]


@pytest.mark.parametrize("path", ["matmul", "sdpa"])
def test_padding_is_invisible_and_the_tower_is_bidirectional(path):
    encoder = make_encoder(path)
    with torch.no_grad():
        encoder.embedding.positions[5:9] = encoder.embedding.positions[4]  # so that [cls] moving is no difference
        encoder.embedding.positions[9] = encoder.embedding.positions[5]
    short = torch.tensor([[BOS, 7, 8, EOS, PAD, CLS]])
    long = torch.tensor([[BOS, 7, 8, EOS, PAD, PAD, PAD, PAD, PAD, CLS]])
    torch.testing.assert_close(encoder(short), encoder(long))
    assert not torch.allclose(encoder(short), encoder(torch.tensor([[BOS, 9, 8, EOS, PAD, CLS]])), atol=1e-3)
    with torch.no_grad():
        encoder.embedding.tokens[PAD] += 10.0
    torch.testing.assert_close(encoder(short), encoder(long))


def test_the_feature_is_the_last_position():
    encoder, ids = make_encoder(), torch.tensor([[BOS, 7, 8, EOS, PAD, CLS]])
    mask = (ids != PAD)[:, None, None, :]
    outputs = encoder.transformer(encoder.embedding(ids), mask)
    torch.testing.assert_close(encoder(ids), encoder.projection(encoder.norm(outputs[:, -1])))


def test_text_beyond_the_context_is_refused():
    with pytest.raises(OpenVisionError, match="context length 10"):
        make_encoder()(torch.ones(1, 11, dtype=torch.long))


@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_captions_are_causal_and_see_the_picture(image_input):
    decoder, tokens = make_decoder(image_input), torch.randn(2, 5, 24)
    ids = torch.randint(4, 12, (2, 8))
    logits = decoder(tokens, ids)
    assert logits.shape == (2, 8, 12)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] - 3) % 8 + 4
    difference = (decoder(tokens, changed) - logits).abs().amax(dim=(0, 2))
    assert difference[:5].max() < 1e-5 and difference[5:].min() > 1e-3
    other = tokens.clone()
    other[:, 4] += torch.randn(24)  # the last image token reaches the first text position
    assert (decoder(other, ids) - logits).abs().amax(dim=(0, 2)).min() > 1e-4


@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_cached_steps_equal_the_uncached_forward(image_input):
    decoder, tokens = make_decoder(image_input), torch.randn(3, 5, 24)
    ids = torch.randint(4, 12, (3, 8))
    state = decoder.start(tokens)
    steps = torch.stack([decoder.step(ids[:, i], state) for i in range(8)], dim=1)
    torch.testing.assert_close(steps, decoder(tokens, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ["matmul", "sdpa"])
@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_a_step_neither_moves_the_cache_nor_depends_on_its_room(image_input, path):
    """Each step's logits against the uncached forward pass, with room to spare, in buffers that stay where they are."""
    decoder, tokens = make_decoder(image_input, context_length=32), torch.randn(3, 5, 24)
    for module in decoder.modules():
        if hasattr(module, "path"):
            module.path = path
    ids = torch.randint(4, 12, (3, 8))
    state = decoder.start(tokens, max_length=20)
    places = [cache.keys.data_ptr() for cache in state.past]
    for i in range(8):
        found, expected = decoder.step(ids[:, i], state), decoder(tokens, ids[:, : i + 1])[:, -1]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert places == [cache.keys.data_ptr() for cache in state.past]
    assert state.past[0].keys.shape[2] == 20 + (5 if image_input == "prefix" else 0)


@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_beams_share_the_picture_and_follow_their_parent(image_input):
    decoder, tokens = make_decoder(image_input), torch.randn(2, 5, 24)
    first, second = torch.randint(4, 12, (6, 3)), torch.randint(4, 12, (6, 2))
    parents = torch.tensor([2, 0, 0, 4, 5, 4])  # rows of the same picture
    state = decoder.start(tokens, num_beams=3)
    for i in range(3):
        decoder.step(first[:, i], state)
    state.reorder(parents)
    found = torch.stack([decoder.step(second[:, i], state) for i in range(2)], dim=1)
    expected = decoder(tokens.repeat_interleave(3, dim=0), torch.cat([first[parents], second], dim=1))[:, 3:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_the_fixed_shape_step_equals_the_other(image_input):
    decoder, tokens = make_decoder(image_input), torch.randn(3, 5, 24)
    ids = torch.randint(4, 12, (3, 8))
    state = decoder.start(tokens)
    steps = [decoder._fixed_step(ids[:, i], torch.tensor([i]), state.past, state.cross, state.prefix) for i in range(8)]
    torch.testing.assert_close(torch.stack(steps, dim=1), decoder(tokens, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_packed_weights_give_the_same_steps_and_follow_training(image_input, dtype):
    decoder, tokens = make_decoder(image_input).to(dtype), torch.randn(3, 5, 24, dtype=dtype)
    assert can_pack(decoder)
    ids = torch.randint(4, 12, (3, 8))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for _ in range(2):
        with torch.no_grad():
            packed = decoder.for_steps()
            state, plain = packed.start(tokens), decoder.start(tokens)
            assert packed is not decoder and packed.embedding.tokens is decoder.embedding.tokens
            for i in range(8):
                found, expected = packed.step(ids[:, i], state), decoder.step(ids[:, i], plain)
                torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
            for parameter in decoder.parameters():
                parameter.mul_(1.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder.for_steps() is decoder


@pytest.mark.slow
def test_compiled_captions_are_the_same():
    decoder, tokens = make_decoder("cross", vocab_size=6, seed=3), torch.randn(12, 5, 24)
    assert torch.equal(greedy_search(decoder, tokens, BOS, EOS, compile=True), greedy_search(decoder, tokens, BOS, EOS))


def test_asking_seldom_whether_all_have_ended_changes_nothing(monkeypatch):
    decoder, tokens = make_decoder("cross", vocab_size=6, seed=3), torch.randn(4, 5, 24)
    expected = [greedy_search(decoder, tokens, BOS, EOS), beam_search(decoder, tokens, BOS, EOS, 3)]
    monkeypatch.setattr(generate, "_all_ended", lambda finished, place: False)
    assert torch.equal(greedy_search(decoder, tokens, BOS, EOS), expected[0])
    assert torch.equal(beam_search(decoder, tokens, BOS, EOS, 3), expected[1])


@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_captions_under_autocast(image_input):
    decoder, tokens = make_decoder(image_input), torch.randn(3, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder.start(tokens).past[0].keys.dtype == torch.bfloat16
        assert greedy_search(decoder, tokens, BOS, EOS).shape[0] == 3


@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_greedy_equals_uncached_decoding(image_input):
    decoder = make_decoder(image_input, vocab_size=6, seed=3)
    tokens = torch.randn(12, 5, 24)
    found = greedy_search(decoder, tokens, BOS, EOS)
    assert found.tolist() == uncached_greedy(decoder, tokens, 9)
    assert len({tuple(row) for row in found.tolist()}) > 3  # the captions are worth comparing
    assert (found == EOS).any() and not (found == EOS).any(dim=1).all()  # some end by themselves, some at the limit
    assert torch.equal(beam_search(decoder, tokens, BOS, EOS, 1), found)
    assert greedy_search(decoder, tokens, BOS, EOS, max_length=4).shape[1] == 4


def test_decoding_stops_when_all_have_ended():
    decoder = make_decoder("cross")
    steps = []
    step = decoder.step

    def ending(ids, state):
        steps.append(1)
        logits = step(ids, state)
        logits[:, EOS] = 100.0 if len(steps) == 3 else -100.0
        return logits

    decoder.step = ending
    assert greedy_search(decoder, torch.randn(4, 5, 24), BOS, EOS).shape[1] == 4
    assert len(steps) == 3


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_wide_beams_find_the_best_of_all_captions(image_input, penalty):
    """Five words and four tokens: all captions can be scored, and a beam wide enough must find the best."""
    decoder, limit = make_decoder(image_input, vocab_size=5, seed=1), 4
    tokens = torch.randn(4, 5, 24)
    best = []
    for image in tokens:
        scored = {}
        for words in itertools.product(range(2, 5), repeat=limit - 1):
            words = words[: words.index(EOS) + 1] if EOS in words else words
            ids = torch.tensor([[BOS, *words]])
            logits = decoder(image[None], ids[:, :-1])[0].clone()
            logits[:, [PAD, BOS]] = -torch.inf
            total = logits.log_softmax(-1)[range(len(words)), list(words)].sum().item()
            scored[words] = total / len(words) ** penalty
        best.append([BOS, *max(scored, key=lambda words: scored[words])])
    found = beam_search(decoder, tokens, BOS, EOS, num_beams=27, max_length=limit, length_penalty=penalty)
    assert [[i for i in row if i != PAD] for row in found.tolist()] == best


def uncached_beam(decoder, image, num_beams, penalty, max_length):
    """Beam search over lists, everything computed anew for each token."""
    beams = [((BOS,), 0.0)]
    while not all(ids[-1] == EOS for ids, _ in beams):
        candidates = []
        for ids, total in beams:
            if ids[-1] == EOS:
                candidates.append((ids, total))
                continue
            if len(ids) == max_length:
                return max(beams, key=lambda beam: beam[1] / (len(beam[0]) - 1) ** penalty)[0]
            logits = decoder(image[None], torch.tensor([ids]))[0, -1].clone()
            logits[[PAD, BOS]] = -torch.inf
            scores = logits.log_softmax(-1).tolist()
            candidates += [((*ids, word), total + score) for word, score in enumerate(scores) if score > -torch.inf]
        candidates.sort(key=lambda beam: beam[1] / (len(beam[0]) - 1) ** penalty, reverse=True)
        beams = candidates[:num_beams]
    return beams[0][0]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_narrow_beams_equal_an_uncached_search(image_input, penalty):
    decoder, tokens = make_decoder(image_input, vocab_size=7, seed=3), torch.randn(16, 5, 24)
    found = beam_search(decoder, tokens, BOS, EOS, num_beams=3, max_length=7, length_penalty=penalty)
    found = [tuple(i for i in row if i != PAD) for row in found.tolist()]
    assert found == [uncached_beam(decoder, image, 3, penalty, 7) for image in tokens]
    greedy = [tuple(i for i in row if i != PAD) for row in greedy_search(decoder, tokens, BOS, EOS, 7).tolist()]
    assert found != greedy  # beams make a difference here
    assert {row[-1] == EOS for row in found} == {True, False}


def test_beams_of_a_batch_do_not_mix():
    decoder, tokens = make_decoder("cross", vocab_size=8), torch.randn(5, 5, 24)
    together = beam_search(decoder, tokens, BOS, EOS, 3)
    for image, row in zip(tokens, together, strict=True):
        alone = beam_search(decoder, image[None], BOS, EOS, 3)[0]
        assert [i for i in row.tolist() if i] == [i for i in alone.tolist() if i]


@pytest.mark.parametrize("length", [1, 10])
def test_impossible_lengths_are_refused(length):
    with pytest.raises(OpenVisionError, match="max_length"):
        greedy_search(make_decoder("cross"), torch.randn(1, 5, 24), BOS, EOS, max_length=length)


@pytest.mark.parametrize("image_input", ["cross", "prefix"])
def test_image_positions_tell_places_apart(image_input):
    tokens, ids = torch.randn(2, 8, 24), torch.randint(4, 12, (2, 6))
    with pytest.raises(OpenVisionError, match="grid="):
        make_decoder(image_input, image_positions=2.0)(tokens, ids)
    bag, placed = make_decoder(image_input), make_decoder(image_input, image_positions=2.0)
    turned = tokens.roll(3, dims=1)
    torch.testing.assert_close(bag(tokens, ids), bag(turned, ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(placed(tokens, ids, (2, 4)), placed(turned, ids, (2, 4)), atol=1e-2)
    assert not torch.allclose(placed(tokens, ids, (2, 4)), placed(tokens, ids, (4, 2)), atol=1e-2)
    state = placed.start(tokens, (2, 4))
    steps = torch.stack([placed.step(ids[:, i], state) for i in range(6)], dim=1)
    torch.testing.assert_close(steps, placed(tokens, ids, (2, 4)), atol=1e-5, rtol=1e-5)
