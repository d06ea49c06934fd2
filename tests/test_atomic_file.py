"""Files that appear as a whole, whatever was in their place."""

import pytest

from keras_mscm.atomic_file import write_atomically

pytestmark = pytest.mark.once


def write(path, text="new"):
    write_atomically(path, lambda new: new.write_text(text), ".txt")


def test_a_file_is_made_or_replaced(tmp_path):
    path = tmp_path / "made" / "file.txt"
    for text in ("one", "two"):
        write(path, text)
        assert path.read_text() == text
    assert [*path.parent.iterdir()] == [path]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "file.txt"
    write(path, "old")

    def fail(new):
        new.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail, ".txt")
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    path, link = tmp_path / "disk" / "file.txt", tmp_path / "link.txt"
    for text in ("one", "two"):  # at first it leads to nothing
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        write(link, text)
        assert link.is_symlink()
        assert path.read_text() == text


def test_a_directory_is_no_file(tmp_path):
    def never(new):
        raise AssertionError("nothing is written")

    (tmp_path / "place" / "within").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"`path` must be a file.*place"):
        write_atomically(tmp_path / "place", never, ".txt")
    assert [*tmp_path.iterdir()] == [tmp_path / "place"]
