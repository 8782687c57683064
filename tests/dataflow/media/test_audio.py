import sys

import numpy as np
import pytest

from connectors.errors import BadInputError, CorruptError
from dataflow.media import decodes, insist_on_decoder, m4a, open_audio
from dataflow.testing.media import encode_audio, encode_image, sound


@pytest.mark.parametrize("codec", ["flac", "wav", "rf64"])
def test_lossless_sound_comes_back_exactly_also_in_parts(codec: str) -> None:
    expected = sound(1, 5000)
    audio = open_audio(memoryview(encode_audio(expected, codec, 22050)))
    assert (audio.rate_hz, audio.channels, audio.frames) == (22050, 2, 5000)
    np.testing.assert_array_equal(audio.decode(0, 5000), expected)
    np.testing.assert_array_equal(audio.decode(1234, 77), expected[:, 1234:1311])
    np.testing.assert_array_equal(audio.decode(0, 1), expected[:, :1])
    audio.check()


@pytest.mark.parametrize("codec", ["mp3", "ogg", "opus"])
def test_a_part_of_lossy_sound_is_that_part_of_the_whole(codec: str) -> None:
    audio = open_audio(encode_audio(sound(1, 100_000) * 0.5, codec, 48000))
    whole = audio.decode(0, audio.frames)
    for start in (4000, 50_000, 99_000, 99_500, 20_000, 70_000, 0):
        np.testing.assert_allclose(audio.decode(start, 500), whole[:, start : start + 500], atol=1e-4)


def tone(frames: int, channels: int = 2) -> np.ndarray:
    wave = np.sin(np.arange(frames) * (2 * np.pi * 440 / 16000)) * 0.3
    return np.stack([wave * (number + 1) / channels for number in range(channels)]).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 2])
def test_m4a_is_decoded_to_what_was_encoded_also_in_parts(channels: int) -> None:
    expected = tone(20_000, channels)
    audio = open_audio(memoryview(encode_audio(expected, "m4a")))
    assert (audio.rate_hz, audio.channels) == (16000, channels)
    assert 20_000 <= audio.frames < 20_000 + 64
    whole = audio.decode(0, 20_000)
    assert whole.dtype == np.float32
    assert np.abs(whole - expected)[:, 2000:-2000].max() < 0.05
    for start in (15_000, 3000, 0):
        np.testing.assert_array_equal(audio.decode(start, 500), whole[:, start : start + 500])
    audio.check()
    with pytest.raises(CorruptError, match="cut off at frame"):
        audio.decode(audio.frames - 1, 2)


def test_m4a_that_is_cut_off_or_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_audio(tone(20_000), "m4a")
    with pytest.raises(CorruptError, match="not readable audio: it is cut off"):
        open_audio(data[:-5])
    with pytest.raises(CorruptError, match="not readable audio"):
        open_audio(data[:40] + bytes(len(data) - 40))
    monkeypatch.setattr(m4a, "MAX_DECODED_BYTES", 1000)
    with pytest.raises(CorruptError, match="more than 1000 bytes"):
        open_audio(data)


def test_without_the_decoder_of_m4a_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_audio(tone(2000), "m4a")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadInputError, match=r"tiered-dataflow\[media\]"):
        open_audio(data)


def test_mono_sound_has_one_channel() -> None:
    assert open_audio(encode_audio(sound(0, channels=1))).decode(0, 10).shape == (1, 10)


@pytest.mark.parametrize("data", [b"", b"no sound", encode_audio(sound(0))[:50]], ids=["empty", "text", "cut"])
def test_what_is_no_sound_is_an_error(data: bytes) -> None:
    with pytest.raises(CorruptError, match="not readable audio") as raised:
        open_audio(data)
    assert "BytesIO" not in str(raised.value)
    assert not decodes("audio", data)


def test_another_kind_of_file_is_named() -> None:
    with pytest.raises(CorruptError, match="it looks like png"):
        open_audio(encode_image(0))


def test_a_damaged_frame_is_an_error() -> None:
    data = bytearray(encode_audio(sound(0, 9000)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(CorruptError, match="not readable audio"):
        open_audio(data).check()


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(BadInputError, match=r"tiered-dataflow\[media\]"):
        open_audio(b"")
    with pytest.raises(BadInputError, match=r"tiered-dataflow\[media\]"):
        insist_on_decoder("audio")
    insist_on_decoder("image")
