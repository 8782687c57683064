import pytest

from dataflow.media import MEDIA_KINDS, SUFFIXES, Codec, sniff
from dataflow.testing.media import encode_audio, encode_image, encode_video, frames, sound


@pytest.mark.parametrize("codec", ["flac", "mp3", "ogg", "opus", "wav", "rf64"])
def test_sound_is_told_by_its_content(codec: str) -> None:
    name = {"opus": "ogg", "rf64": "wav"}.get(codec, codec)
    assert sniff(encode_audio(sound(0, 2000), codec, 48000)) == Codec("audio", name)


@pytest.mark.parametrize("codec", ["jpeg", "png", "webp", "bmp"])
def test_images_are_told_by_their_content(codec: str) -> None:
    assert sniff(encode_image(0, codec)) == Codec("image", codec.replace("jpeg", "jpg"))


@pytest.mark.parametrize("container", ["avi", "gif", "matroska", "mov", "mp4", "webm"])
def test_video_is_told_by_its_content(container: str) -> None:
    assert sniff(encode_video(frames(3), container)) == Codec("video", container.replace("matroska", "mkv"))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"\xff\xff\xff\xff", b"text", b"RIFF1234NONE", b"\x80theora", b"OggS" + b"\x80theora" * 9],
    ids=repr,
)
def test_anything_else_is_none_of_them(data: bytes) -> None:
    assert sniff(data) is None


def test_a_long_mp3_tag_or_none_makes_no_difference() -> None:
    data = encode_audio(sound(0, 2000), "mp3")
    assert sniff(memoryview(data)) == sniff(b"ID3\x04" + bytes(2000) + data) == Codec("audio", "mp3")


def test_every_suffix_belongs_to_a_codec_of_a_known_kind() -> None:
    assert {codec.kind for codec in SUFFIXES.values()} == set(MEDIA_KINDS)
    assert all(SUFFIXES[f".{codec.name}"] == codec for codec in SUFFIXES.values())
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in SUFFIXES)
