import sys

import numpy as np
import pytest

from connectors.errors import BadInputError, CorruptError
from dataflow.media import decodes, insist_on_decoder, open_audio
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


def test_mono_sound_has_one_channel() -> None:
    assert open_audio(encode_audio(sound(0, channels=1))).decode(0, 10).shape == (1, 10)


@pytest.mark.parametrize("data", [b"", b"no sound", encode_audio(sound(0))[:50]], ids=["empty", "text", "cut"])
def test_what_is_no_sound_is_an_error(data: bytes) -> None:
    with pytest.raises(CorruptError, match="not readable audio"):
        open_audio(data)
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
