import copy
import pickle

import pytest

import connectors
from connectors import DataError, ErrorKind, error_from_kind

TREE = {
    "NotFoundError": (FileNotFoundError, "not_found"),
    "PermissionDeniedError": (PermissionError, "permission_denied"),
    "ThrottledError": (Exception, "throttled"),
    "TransientError": (ConnectionError, "transient"),
    "CorruptError": (ValueError, "corrupt"),
    "ChangedError": (Exception, "changed"),
    "BadInputError": (ValueError, "bad_input"),
}
CLASSES = [DataError, *(getattr(connectors, name) for name in TREE)]


def test_the_tree_has_this_shape():
    assert {cls.__name__ for cls in DataError.__subclasses__()} == set(TREE)
    for name, (builtin, kind) in TREE.items():
        cls = getattr(connectors, name)
        assert cls.__mro__[1] is DataError
        assert issubclass(cls, builtin)
        assert cls("x").kind == kind


def test_kinds_are_stable():
    assert [kind.value for kind in ErrorKind] == [
        "unknown", "not_found", "permission_denied", "throttled", "transient", "timeout", "short_body", "unreachable",
        "corrupt", "changed", "bad_input", "bad_range", "no_space", "protocol",
    ]  # fmt: skip


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("duplicate", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_survives_pickling_and_copying_whole(cls, duplicate):
    error = duplicate(cls("no object at s3://b/k", kind=ErrorKind.TIMEOUT, uri="s3://b/k"))
    assert type(error) is cls
    assert (str(error), error.kind, error.uri) == ("no object at s3://b/k", ErrorKind.TIMEOUT, "s3://b/k")


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_can_be_made_of_its_text_alone(cls):
    error = type(cls("text"))(str(cls("text")))
    assert (str(error), error.kind, error.uri) == ("text", cls.default_kind, None)


@pytest.mark.parametrize("kind", ErrorKind)
def test_a_kind_makes_the_error_that_has_it(kind):
    error = error_from_kind(kind.value, "text", "s3://b/k")
    assert (error.kind, str(error), error.uri) == (kind, "text", "s3://b/k")
    assert pickle.loads(pickle.dumps(error)).kind == kind


@pytest.mark.parametrize("cls", CLASSES)
def test_the_default_kind_of_a_class_makes_that_class(cls):
    assert type(error_from_kind(cls.default_kind, "text")) is cls


def test_a_kind_from_a_newer_release_is_a_plain_data_error():
    error = error_from_kind("melted", "text")
    assert type(error) is DataError
    assert error.kind == ErrorKind.UNKNOWN
