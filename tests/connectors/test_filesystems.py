import pytest

from connectors.filesystems import filesystem_magic, is_local, mount_of, mount_points, parse_mount_points

LUSTRE, NFS, FUSE, EXT4, TMPFS = 0x0BD00BD0, 0x6969, 0x65735546, 0xEF53, 0x01021994


@pytest.mark.parametrize(
    ("magic", "local"), [(EXT4, True), (TMPFS, True), (LUSTRE, False), (NFS, False), (FUSE, False), (0x1234, False)]
)
def test_local_is_only_what_is_known_to_be(tmp_path, magic, local):
    assert is_local(str(tmp_path), magic_of=lambda path: magic) is local


def test_a_path_that_does_not_exist_is_judged_by_its_parent(tmp_path):
    asked = []

    def magic_of(path):
        asked.append(path)
        if path != str(tmp_path):
            raise FileNotFoundError(path)
        return LUSTRE

    assert not is_local(str(tmp_path / "a" / "b"), magic_of=magic_of)
    assert asked == [str(tmp_path / "a" / "b"), str(tmp_path / "a"), str(tmp_path)]


def test_a_path_that_cannot_be_asked_counts_as_shared(tmp_path):
    def magic_of(path):
        raise PermissionError(path)

    assert not is_local(str(tmp_path), magic_of=magic_of)


def test_the_kernel_answers_for_proc_and_for_a_missing_path(tmp_path):
    assert filesystem_magic("/proc") == 0x9FA0
    with pytest.raises(FileNotFoundError):
        filesystem_magic(str(tmp_path / "absent"))


MOUNTINFO = r"""22 28 0:21 / /proc rw,nosuid shared:12 - proc proc rw
28 0 253:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
44 28 0:40 / /mnt/my\040data rw - nfs4 server:/x rw

"""


def test_mount_points_are_read_with_their_odd_characters():
    assert parse_mount_points(MOUNTINFO) == {"/proc", "/", "/mnt/my data"}
    assert {"/", "/proc"} <= mount_points()


@pytest.mark.parametrize(
    ("path", "mount"),
    [("/mnt/my data/a/b", "/mnt/my data"), ("/mnt/my data", "/mnt/my data"), ("/mnt/my", "/"), ("/x", "/"), ("/", "/")],
)
def test_a_path_lies_below_the_nearest_mount_point(path, mount):
    assert mount_of(path, parse_mount_points(MOUNTINFO)) == mount
    assert mount_of(path, frozenset()) == "/"
