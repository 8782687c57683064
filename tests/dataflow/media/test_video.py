import sys

import numpy as np
import pytest

from connectors.errors import BadInputError, CorruptError
from dataflow.media import decodes, insist_on_decoder, open_video
from dataflow.testing.media import encode_audio, encode_video, frames, sound

CONTAINERS = ["avi", "gif", "matroska", "mov", "mp4", "webm"]


def levels(clip: np.ndarray) -> list[int]:
    """The number of each frame, by its grey."""
    return [round(level / 8) for level in clip.mean((1, 2, 3))]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_clip_has_the_frames_asked_for(container: str) -> None:
    video = open_video(memoryview(encode_video(frames(25), container)))
    assert (video.frames, video.height, video.width) == (25, 16, 32)
    assert levels(video.clip(0, 25)) == list(range(25))
    assert levels(video.clip(13, 4)) == [13, 14, 15, 16]
    assert levels(video.clip(3, 5, step=4)) == [3, 7, 11, 15, 19]
    assert levels(video.clip(23, 4)) == [23, 24, 24, 24]
    video.check()


@pytest.mark.parametrize("container", ["avi", "matroska", "mov", "mp4"])
def test_a_clip_is_that_part_of_the_whole_also_where_frames_are_stored_in_another_order(container: str) -> None:
    video = open_video(encode_video(frames(25), container, b_frames=2))
    whole = video.clip(0, video.frames)
    for start in range(video.frames - 2):
        np.testing.assert_array_equal(video.clip(start, 3), whole[start : start + 3])


def test_a_clip_is_scaled() -> None:
    clip = open_video(encode_video(frames(3))).clip(0, 2, size=(8, 10))
    assert clip.shape == (2, 8, 10, 3)
    assert clip.dtype == np.uint8


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_that_is_cut_off_is_an_error(container: str) -> None:
    data = encode_video(frames(12), container)
    assert decodes("video", data)
    assert not any(decodes("video", data[:length]) for length in range(0, len(data), len(data) // 23))


@pytest.mark.parametrize("data", [b"", b"no video", encode_audio(sound(0))], ids=["empty", "text", "flac"])
def test_what_is_no_video_is_an_error(data: bytes) -> None:
    with pytest.raises(CorruptError, match="not a readable video"):
        open_video(data)


def test_no_flipped_byte_is_more_than_an_error() -> None:
    data = encode_video(frames(5))
    for position in range(0, len(data), 41):
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        assert decodes("video", bytes(damaged)) in (True, False)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadInputError, match=r"tiered-dataflow\[media\]"):
        open_video(b"")
    with pytest.raises(BadInputError, match=r"tiered-dataflow\[media\]"):
        insist_on_decoder("video")
