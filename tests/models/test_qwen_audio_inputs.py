"""Qwen2-Audio: transformers' processor, fewer tokens, conversations, inputs with errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from checkpoints import Saved, distance
from qwen_audio_checkpoints import BANDS, FRAMES, MARKER, inputs, labels_of, prompt, sounds, tokens
from torch import Tensor

from mmkernels.models import ContextPolicy, QwenAudio, cut_sound, log_mel
from mmkernels.testing.speech import speak

PLAIN = "qwen2_audio"
TOLERANCE = 5e-6
SECONDS = FRAMES / 100
Checkpoints = Callable[[str], Saved]
Ours = Callable[..., QwenAudio]

# transformers' processor.


class Extractor(transformers.WhisperFeatureExtractor):  # type: ignore[misc]
    """Of sounds of `SECONDS`: transformers' class takes whole seconds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.n_samples, self.nb_max_frames = round(SECONDS * 16_000), FRAMES


class Processor(transformers.Qwen2AudioProcessor):  # type: ignore[misc]
    """Takes an `Extractor` too, which transformers does not know."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        is_extractor = argument_name == "feature_extractor"
        return Extractor if is_extractor else super().check_argument_for_proper_class(argument_name, argument)


@pytest.fixture(scope="module")
def processor() -> Any:
    """It knows the words w5 to w89."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"<pad>": 0, "<unk>": 1, "<eos>": 2, "<|audio_bos|>": 97, "<|audio_eos|>": 98, "<|AUDIO|>": MARKER}
    words = {f"w{number}": number for number in range(5, 90)}
    tokenizer = Tokenizer(models.WordLevel(special | words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left",
        additional_special_tokens=list(special),
    )  # fmt: skip
    return Processor(Extractor(feature_size=BANDS), fast)


@pytest.mark.parametrize(
    ("seconds", "frames"),
    [
        ([[0.5]], [50]),
        ([[0.3, SECONDS], [0.05]], [30, FRAMES, 5]),
        ([[], [0.4]], [40]),
        ([[1 / 16_000, 0.2]], [1, 20]),  # one sample: a sound without a token
        ([[3.0]], [FRAMES]),  # what is behind the longest sound is dropped
    ],
)
def test_the_processor_makes_the_inputs(
    ours: Ours, saved: Checkpoints, processor: Any, seconds: list[list[float]], frames: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    marked = "<|audio_bos|> <|AUDIO|> <|audio_eos|> w7 "
    texts = [f"w{5 + row} " + marked * len(each) + "w8 w9 " * (row + 1) for row, each in enumerate(seconds)]
    noise = [torch.rand(round(n * 16_000), generator=generator) - 0.5 for each in seconds for n in each]
    given = dict(processor(audio=[x.numpy() for x in noise], text=texts, return_tensors="pt", padding=True))
    assert given["feature_attention_mask"].sum(1).tolist() == frames
    assert int((given["input_ids"] == MARKER).sum()) == sum(map(tokens, frames))
    model, theirs = ours(PLAIN), saved(PLAIN).theirs
    valid = given["attention_mask"].bool()
    with torch.no_grad():
        out = model(**given).logits
        assert distance(out[valid], theirs(**given).logits[valid]) < TOLERANCE
        expected = theirs.generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert model.generate(**given, max_new_tokens=4, eos_token_id=()).tokens.tolist() == expected[:, -4:].tolist()
    if max(map(len, noise)) <= SECONDS * 16_000:  # `log_mel` refuses longer ones
        mel = log_mel(noise, 16_000, bands=BANDS, seconds=SECONDS)
        assert torch.equal(mel.features, given["input_features"]) and list(mel.lengths) == frames
        text = {name: given[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            assert torch.equal(model(**text, input_features=mel.features, frame_lengths=mel.lengths).logits, out)


def test_speech_matters(ours: Ours) -> None:
    """Two spoken words, one voice: what is said changes the answer."""
    model = ours(PLAIN)
    said = [speak(word, voice="en-us+f3")[: round(SECONDS * 16_000)] for word in ("seven", "three")]
    mel = log_mel(said, 16_000, bands=BANDS, seconds=SECONDS)
    with torch.no_grad():
        visual = [model.encode(mel.features[n : n + 1], mel.lengths[n : n + 1]) for n in range(2)]
        count = min(*visual[0].lengths, *visual[1].lengths)
        ids = prompt([[4 * count]])["input_ids"]
        first, second = (
            model(ids, sounds=x._replace(tokens=x.tokens[:count], lengths=(count,), marked=(count,))).logits[:, -1]
            for x in visual
        )
    assert distance(first, second) > 0.05


def test_ten_minutes(ours: Ours) -> None:
    """Cut into windows, each a sound; `text_length` bounds how many one prompt has."""
    model = ours(PLAIN)
    parts = cut_sound(torch.zeros(600 * 16_000), seconds=SECONDS)
    mel = log_mel(parts, 16_000, bands=BANDS, seconds=SECONDS)
    assert mel.features.shape == (750, BANDS, FRAMES)
    ids = prompt([[FRAMES] * 750])["input_ids"]
    with pytest.raises(ValueError, match=r"input_ids must have at most 512 tokens \(text_length\)"):
        model(ids, input_features=mel.features, frame_lengths=mel.lengths)


# Fewer tokens.


def by_hand(tokens: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Returns the means of two neighbours of each sound; a token that is left over stays alone."""
    return [torch.stack([x.mean(0) for x in sound.split(2)]) for sound in tokens.split(list(lengths))]


def test_pooling_by_hand(ours: Ours, saved: Checkpoints) -> None:
    """Logits, loss and positions are those of the shorter prompt with the tokens that are left."""
    theirs, model = saved(PLAIN).theirs, ours(PLAIN)
    given = prompt([[FRAMES, 33, 1]]) | sounds(theirs, [FRAMES, 33, 1])
    labels = labels_of(given)
    plain = model.encode(given["input_features"], [FRAMES, 33, 1])
    assert plain.lengths == (20, 8, 0)
    pooled = by_hand(plain.tokens[:28], (20, 8))
    try:
        model.set_reducer("pool:2")
        visual = model.encode(given["input_features"], [FRAMES, 33, 1])
        assert visual.lengths == (10, 4, 0) and visual.marked == (20, 8, 0)
        torch.testing.assert_close(visual.tokens, torch.cat(pooled))
        with torch.no_grad():
            out = model(**given, labels=labels, return_logits=True)
            again = model(given["input_ids"], sounds=visual, labels=labels)
    finally:
        model.set_reducer(None)
    short = prompt([[40, 16, 1]])  # 10, 4 and no tokens
    left = plain._replace(tokens=torch.cat(pooled), lengths=(10, 4, 0), marked=(10, 4, 0))
    text = given["input_ids"][given["input_ids"] != MARKER]
    short["input_ids"][short["input_ids"] != MARKER] = text
    with torch.no_grad():
        expected = model(**short, sounds=left).logits
    assert distance(out.logits, expected) < TOLERANCE
    loss = F.cross_entropy(expected[0, :-1], labels_of(short)[0, 1:])
    assert distance(out.loss, loss) < TOLERANCE and torch.equal(again.loss, out.loss)


@pytest.mark.parametrize(("reduce", "left"), [("tome:0.5", (10, 4)), ("diverse:0.25", (5, 2)), ("pool:<=6", (5, 4))])
def test_other_reducers(ours: Ours, saved: Checkpoints, reduce: str, left: tuple[int, ...]) -> None:
    model, theirs = QwenAudio(ours(PLAIN).config), saved(PLAIN).theirs
    model.load_state_dict(ours(PLAIN).state_dict())
    model.eval().set_reducer(reduce)
    given = prompt([[FRAMES], [33]]) | sounds(theirs, [FRAMES, 33])
    found = model.encode(given["input_features"], [FRAMES, 33])
    assert all(n <= m for n, m in zip(found.lengths, (20, 8))) and sum(found.lengths) < 28
    if "<=" not in reduce:
        assert found.lengths == left
    out = model(**given, labels=labels_of(given))
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


# Conversations.


def test_turns_encode_nothing_again(ours: Ours, saved: Checkpoints) -> None:
    model, theirs = ours(PLAIN), saved(PLAIN).theirs
    given = prompt([[50]]) | sounds(theirs, [50])
    calls: list[int] = []
    hook = model.audio.register_forward_hook(lambda *_: calls.append(1))
    more = torch.tensor([[5, 6, 7]])
    first = model.generate(**given, max_new_tokens=3, eos_token_id=())
    second = model.generate(more, kv_cache=first.kv_cache, max_new_tokens=3, eos_token_id=())
    assert calls == [1]
    visual = model.encode(given["input_features"], [50])
    for _ in range(2):
        again = model.generate(given["input_ids"], sounds=visual, max_new_tokens=3, eos_token_id=())
        assert torch.equal(again.tokens, first.tokens)
    hook.remove()
    assert calls == [1, 1]
    whole = torch.cat([given["input_ids"], first.tokens, more], 1)
    expected = theirs.generate(
        input_ids=whole, attention_mask=torch.ones_like(whole), input_features=given["input_features"],
        feature_attention_mask=given["feature_attention_mask"], max_new_tokens=3, do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert second.tokens.tolist() == expected[:, -3:].tolist()


def test_a_policy_forgets_sounds(ours: Ours, saved: Checkpoints) -> None:
    model, theirs = ours(PLAIN), saved(PLAIN).theirs
    policy = ContextPolicy(max_visual_tokens=20)
    ids = [prompt([rows])["input_ids"] for rows in ([40, 33], [40])]
    first = model.generate(ids[0], **sounds(theirs, [40, 33]), max_new_tokens=2, policy=policy)
    assert first.kv_cache.visual_tokens().tolist() == [18]
    out = model(ids[1], **sounds(theirs, [40]), kv_cache=first.kv_cache, policy=policy)
    assert out.kv_cache.visual_tokens().tolist() == [18]  # the older of 10 is forgotten: 8 and 10 are left


def test_a_sound_without_tokens_is_forgotten_with_nothing(ours: Ours, saved: Checkpoints) -> None:
    """It has a number among the sounds of the conversation, and no place in the cache."""
    model, theirs = ours(PLAIN), saved(PLAIN).theirs
    given = prompt([[40, 1, 20]])["input_ids"]
    first = model.generate(given, **sounds(theirs, [40, 1, 20]), max_new_tokens=2)
    assert first.kv_cache.image_ids == [0, 2] and first.kv_cache.visual_tokens().tolist() == [15]
    policy, more = ContextPolicy(max_visual_tokens=16), prompt([[40, 2]])["input_ids"]
    out = model(more, **sounds(theirs, [40, 2]), kv_cache=first.kv_cache, policy=policy)
    assert out.kv_cache.image_ids == [2, 3] and out.kv_cache.visual_tokens().tolist() == [15]


# Inputs with errors.


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"input_features": None}, "feature_attention_mask must be None without input_features, got Tensor"),
        (
            {"input_features": None, "feature_attention_mask": None},
            r"input_ids must have 0 tokens 99 \(sound\) for 0 sounds, got 34",
        ),
        (
            {"feature_attention_mask": None},
            r"input_ids must have 60 tokens 99 \(sound\) for 3 sounds of 20, 20, 20 tokens, got 34",
        ),
        (
            {"feature_attention_mask": torch.ones(3, FRAMES - 1).long()},
            r"feature_attention_mask must be integers \[3, 80\] as input_features, got torch.int64 \[3, 79\]",
        ),
        (
            {"feature_attention_mask": torch.ones(3, FRAMES)},
            "feature_attention_mask must be integers .*got torch.float",
        ),
        ({"feature_attention_mask": [1]}, "feature_attention_mask must be integers .*got list"),
        (
            {"feature_attention_mask": (torch.arange(FRAMES) > 3).long().expand(3, -1)},
            "feature_attention_mask must have ones, then zeros, in each row; got a one behind a zero",
        ),
        (
            {"feature_attention_mask": torch.zeros(3, FRAMES).long()},
            "lengths in feature_attention_mask must be 1 or more, got 0",
        ),
        ({"frame_lengths": [80, 33, 26]}, "frame_lengths must be None with feature_attention_mask, got both"),
        (
            {"input_features": torch.ones(3, BANDS, FRAMES).long()},
            "input_features must be a floating tensor, got torch",
        ),
        ({"input_features": [1.0]}, "input_features must be a floating tensor, got list|feature_attention_mask"),
        (
            {"input_features": torch.rand(3, BANDS + 1, FRAMES)},
            r"input_features must be \[N, 12, T\], T from 3 to 80 frames, got shape \(3, 13, 80\)",
        ),
        ({"pixel_values": torch.rand(1, 3, 4, 4)}, "inputs of QwenAudio beside the text must be of .*got pixel_values"),
        ({"images": None}, "inputs of QwenAudio beside the text must be of input_features, .*got images"),
    ],
)
def test_bad_inputs(ours: Ours, saved: Checkpoints, change: dict[str, Any], match: str) -> None:
    model, given = ours(PLAIN), inputs(saved(PLAIN).theirs)
    calls: list[int] = []
    hook = model.audio.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises((TypeError, ValueError), match=match):
        model(**(given | change))
    hook.remove()
    assert not calls  # found before anything is encoded


@pytest.mark.parametrize(
    ("shape", "lengths", "match"),
    [
        ((1, BANDS, FRAMES + 1), None, "got shape .*; cut a longer sound in several"),
        ((1, BANDS, 2), None, "T from 3 to 80 frames, got shape"),
        ((BANDS, FRAMES), None, r"must be \[N, 12, T\], T from 3 to 80 frames, got shape \(12, 80\)$"),
        ((2, BANDS, FRAMES), [9], "frame_lengths must be of 2 sounds as input_features, got 1"),
        ((1, BANDS, FRAMES), [81], "frame_lengths must be at most 80 frames, got 81 of sound 0"),
        ((1, BANDS, FRAMES), [0], "frame_lengths must be 1 or more, got 0"),
        ((1, BANDS, FRAMES), [9.0], "frame_lengths must be integers, the frames of each sound, got float"),
        ((1, BANDS, FRAMES), 9, "frame_lengths must be a sequence of integers"),
        ((2**18, BANDS, FRAMES), None, "input_features must have at most 16777216 frames in all, got 20971520"),
    ],
)
def test_bad_features(ours: Ours, shape: tuple[int, ...], lengths: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        ours(PLAIN).encode(torch.zeros(()).expand(shape), lengths)


def test_sounds_of_another_model(ours: Ours, saved: Checkpoints) -> None:
    given = inputs(saved(PLAIN).theirs)
    visual = QwenAudio.from_size("tiny").encode(torch.rand(1, 16, 100))
    with pytest.raises(ValueError, match=r"sounds must be \[tokens, 48\], as encode returns, got"):
        ours(PLAIN)(given["input_ids"], sounds=visual)
    with pytest.raises(TypeError, match="sounds must be what encode returns, got Tensor"):
        ours(PLAIN)(given["input_ids"], sounds=visual.tokens)
    with pytest.raises(ValueError, match="input_features must be None with sounds, got both"):
        ours(PLAIN)(given["input_ids"], input_features=given["input_features"], sounds=visual)
