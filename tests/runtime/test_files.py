"""Files that exist whole or not at all."""

import pytest

from jax_ddpm.runtime.files import read_json, replacing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fill():
        with replacing(path) as partial:
            partial.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_text() == "old"


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 100_000, "\0", "\udcff"])
def test_what_is_no_json_is_a_value_error(tmp_path, text):
    (tmp_path / "file").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"line 1|nested too deep|can't decode"):
        read_json(tmp_path / "file")
