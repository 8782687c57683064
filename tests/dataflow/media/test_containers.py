import pytest

from connectors.errors import CorruptError
from dataflow.media import decodes, insist_on_whole
from dataflow.testing.media import encode_audio, encode_image, encode_video, frames, sound

VIDEOS = ("avi", "gif", "matroska", "mov", "mp4", "webm")
FILES = {
    "wav": lambda: encode_audio(sound(0), "wav"),
    "rf64": lambda: encode_audio(sound(0), "rf64"),
    "ogg": lambda: encode_audio(sound(0, 3000), "ogg"),
    "webp": lambda: encode_image(0, "webp"),
    **{
        name: lambda name=name: encode_video(frames(12), name)
        for name in ("avi", "gif", "matroska", "mov", "mp4", "webm")
    },
}


@pytest.mark.parametrize("name", FILES)
def test_a_container_that_is_cut_off_anywhere_says_so(name: str) -> None:
    data = FILES[name]()
    insist_on_whole(memoryview(data))
    for length in range(40, len(data), max(1, len(data) // 97)):
        with pytest.raises(CorruptError, match="cut off"):
            insist_on_whole(memoryview(data)[:length])
    with pytest.raises(CorruptError, match="cut off"):
        insist_on_whole(memoryview(data)[:-1])


@pytest.mark.parametrize("codec", ["flac", "mp3", "opus"])
def test_what_no_container_says_the_decoder_does(codec: str) -> None:
    data = encode_audio(sound(0, 9000), codec, 48000)
    assert decodes("audio", data)
    assert not any(decodes("audio", data[:length]) for length in range(0, len(data), len(data) // 29))


def test_a_recording_of_unknown_length_is_whole() -> None:
    data = bytearray(encode_audio(sound(0), "wav"))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    insist_on_whole(memoryview(data))
    segment = b"\x1aE\xdf\xa3\x80" + b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" + b"clusters"
    insist_on_whole(memoryview(segment))


def test_a_box_that_runs_to_the_end_or_has_64_bits_is_whole() -> None:
    large = (1).to_bytes(4, "big") + b"mdat" + (20).to_bytes(8, "big") + b"abcd"
    insist_on_whole(memoryview(b"\0\0\0\x10ftypisom\0\0\0\0" + large + b"\0\0\0\0mdat and so on"))
    with pytest.raises(CorruptError, match="box at offset 16"):
        insist_on_whole(memoryview(b"\0\0\0\x10ftypisom\0\0\0\0" + large[:-1]))
    with pytest.raises(CorruptError, match="box at offset 16"):
        insist_on_whole(memoryview(b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\x07mdat"))


def test_other_files_are_not_looked_at() -> None:
    insist_on_whole(memoryview(b""))
    insist_on_whole(memoryview(b"anything"))
