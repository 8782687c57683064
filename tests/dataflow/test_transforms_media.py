import pickle

import numpy as np
import pyarrow as pa
import pytest

from connectors.errors import BadInputError, CorruptError
from dataflow import ShardWriter, audio_field, open_dataset, video_field
from dataflow.formats import field_kind
from dataflow.testing.media import encode_audio, encode_video, frames, sound
from dataflow.transforms import DecodeAudio, DecodeVideo, Draws, TransformedDataset

LENGTHS = [300, 120, 200]
SOUNDS = [encode_audio(sound(number, length)) for number, length in enumerate(LENGTHS)]
VIDEOS = [encode_video(frames(count)) for count in (20, 12, 5)]

CASES = [(DecodeAudio(), "audio", SOUNDS[0]), (DecodeVideo(frames=1), "video", VIDEOS[0])]


def draws(*samples: int) -> Draws:
    return Draws(0, 0, np.array(samples, np.int64))


def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.zeros(shape, dtype)


def both(transform: object, field: str, files: list[bytes]) -> tuple[list[dict], dict]:
    """The same files as samples and as a batch."""
    numbers = draws(*range(len(files)))
    samples = [transform({field: file, "n": n}, numbers[n]) for n, file in enumerate(files)]
    return samples, transform.transform_columns({field: files, "n": [0, 1, 2]}, numbers, allocate)


@pytest.mark.parametrize("start", ["random", "first", "middle"])
def test_sounds_are_cut_and_filled_to_one_length(start: str) -> None:
    samples, columns = both(DecodeAudio(frames=200, start=start, rate_field="rate"), "audio", SOUNDS)
    assert columns["audio"].shape == (3, 2, 200)
    assert columns["audio"].dtype == np.float32
    assert columns["rate"].tolist() == [16000] * 3
    for number, sample in enumerate(samples):
        np.testing.assert_array_equal(columns["audio"][number], sample["audio"])
        assert (sample["rate"], sample["n"]) == (16000, number)
    places = [
        place for place in range(101) if np.array_equal(sound(0, 300)[:, place : place + 200], samples[0]["audio"])
    ]
    assert len(places) == 1
    assert start == "random" or places == [{"first": 0, "middle": 50}[start]]
    np.testing.assert_array_equal(samples[1]["audio"][:, :120], sound(1, 120))
    assert not samples[1]["audio"][:, 120:].any()
    np.testing.assert_array_equal(samples[2]["audio"], sound(2, 200))


def test_sounds_of_different_lengths_become_a_list() -> None:
    samples, columns = both(DecodeAudio(mono=True), "audio", SOUNDS)
    assert [array.shape for array in columns["audio"]] == [(1, length) for length in LENGTHS]
    np.testing.assert_array_equal(samples[0]["audio"][0], sound(0, 300).mean(0))


def test_another_rate_is_refused_and_named() -> None:
    with pytest.raises(BadInputError, match="field 'audio' of sample 7: it has 16000 frames a second instead of 8000"):
        DecodeAudio(rate_hz=8000).transform_columns({"audio": SOUNDS[:1]}, draws(7), allocate)


@pytest.mark.parametrize("size", [None, (8, 16)])
def test_clips_have_one_shape(size: tuple[int, int] | None) -> None:
    samples, columns = both(DecodeVideo(frames=4, step=3, size=size), "video", VIDEOS)
    assert columns["video"].shape == (3, 4, *(size or (16, 32)), 3)
    for number, sample in enumerate(samples):
        np.testing.assert_array_equal(columns["video"][number], sample["video"])
    shown = [[round(level / 8) for level in clip.mean((1, 2, 3))] for clip in columns["video"]]
    assert shown[0] == [shown[0][0] + 3 * place for place in range(4)]
    assert shown[2] == [0, 3, 3, 3]


def test_the_start_of_a_clip_is_drawn_for_the_sample_and_lies_anywhere() -> None:
    transform, starts = DecodeVideo(frames=18), set()
    for number in range(40):
        clip = transform({"video": VIDEOS[0]}, draws(number)[0])["video"]
        np.testing.assert_array_equal(clip, transform({"video": VIDEOS[0]}, draws(number)[0])["video"])
        starts.add(round(clip[0].mean() / 8))
    assert starts == {0, 1, 2}
    assert round(DecodeVideo(frames=18, start="middle")({"video": VIDEOS[0]}, draws(0)[0])["video"][0].mean() / 8) == 1


@pytest.mark.parametrize(
    ("transform", "field", "file"),
    [(DecodeAudio(), "audio", SOUNDS[0]), (DecodeVideo(frames=1), "video", VIDEOS[0])],
    ids=["audio", "video"],
)
def test_an_undecodable_file_is_named_with_sample_and_field(transform: object, field: str, file: bytes) -> None:
    with pytest.raises(CorruptError, match=f"field '{field}' of sample 5: not .*readable"):
        transform.transform_columns({field: [file, file[:-40]]}, draws(4, 5), allocate)
    with pytest.raises(BadInputError, match=f"field '{field}' must hold the bytes of a file, got str"):
        transform({field: "x.wav"}, draws(0)[0])
    with pytest.raises(CorruptError, match=f"field '{field}' of sample 5: .* is null"):
        transform.transform_columns({field: [file, None]}, draws(4, 5), allocate)
    with pytest.raises(BadInputError, match=f"no field '{field}', only other"):
        transform({"other": 1}, draws(0)[0])
    with pytest.raises(BadInputError, match="have no field"):
        transform.transform_columns({"other": []}, draws(), allocate)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DecodeAudio(frames=0),
        lambda: DecodeAudio(rate_hz=0),
        lambda: DecodeAudio(start="end"),
        lambda: DecodeVideo(frames=0),
        lambda: DecodeVideo(frames=1, step=0),
        lambda: DecodeVideo(frames=1, size=(0, 4)),
        lambda: DecodeVideo(frames=1, start="end"),
    ],
    ids=range(7),
)
def test_senseless_settings_are_refused(make: object) -> None:
    with pytest.raises(BadInputError):
        make()


def test_a_dataset_keeps_kinds_and_files_and_decodes_by_spec(tmp_path) -> None:
    with ShardWriter(tmp_path / "set", pa.schema([audio_field("audio"), video_field("video")])) as writer:
        for audio, video in zip(SOUNDS, VIDEOS, strict=True):
            writer.write({"audio": audio, "video": video})
    dataset = open_dataset(tmp_path / "set", encoded=["video"])
    assert [field_kind(field) for field in dataset.schema] == ["audio", "video"]
    assert dataset.get_batch([2, 0])["audio"] == [SOUNDS[2], SOUNDS[0]]
    steps = pickle.loads(pickle.dumps([DecodeAudio(frames=50), DecodeVideo(frames=2)]))
    batch = TransformedDataset(dataset, steps).__getitems__([0, 2])
    assert batch.columns["audio"].shape == (2, 2, 50)
    assert batch.columns["video"].shape == (2, 2, 16, 32, 3)
