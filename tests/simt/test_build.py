"""What the executor's builds leave to other processes."""

from . import build


def test_a_library_that_a_process_has_loaded_is_not_written_into(tmp_path):
    file, folder = tmp_path / "library.so", tmp_path / "loaded"
    folder.mkdir()
    file.write_bytes(b"old")
    build.copy_whole(file, folder)
    with (folder / file.name).open("rb") as loaded:
        file.write_bytes(b"new")
        build.copy_whole(file, folder)
        assert loaded.read() == b"old"
    assert (folder / file.name).read_bytes() == b"new"
    assert list(folder.iterdir()) == [folder / file.name]
