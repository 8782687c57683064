import pytest

from connectors.errors import BadInputError
from dataflow.media import decodes, insist_on_decoder
from dataflow.testing.media import encode_audio, encode_image, encode_video, frames, sound

FILES = {"audio": encode_audio(sound(0)), "image": encode_image(0), "video": encode_video(frames(3))}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_decodes_as_what_it_is_and_nothing_else(kind: str) -> None:
    insist_on_decoder(kind)
    assert [name for name, data in FILES.items() if decodes(kind, data)] == [kind]


def test_other_kinds_are_refused() -> None:
    with pytest.raises(BadInputError, match="audio, image, video"):
        insist_on_decoder("smell")
