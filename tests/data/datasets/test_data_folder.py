import pytest

from detkit.data.datasets.data_folder import DataFolder


@pytest.mark.parametrize(
    ("root", "name", "path"),
    [
        pytest.param("images", "a/b.jpg", "images/a/b.jpg", id="plain"),
        pytest.param("images", "a/../b.jpg", "images/a/../b.jpg", id="up and down within"),
        pytest.param("images", "a..b:c.jpg", "images/a..b:c.jpg", id="odd"),
        pytest.param("", "b.jpg", "b.jpg", id="here"),
        pytest.param("/data", "/data/b.jpg", "/data/b.jpg", id="absolute below"),
        pytest.param("/", "/any/b.jpg", "/any/b.jpg", id="anywhere"),
        pytest.param("s3://bucket/images", "b.jpg", "s3://bucket/images/b.jpg", id="address"),
    ],
)
def test_name_in_the_folder_gives_its_path(root, name, path):
    assert DataFolder(root, "a.json").path_of(name) == path


@pytest.mark.parametrize(
    ("root", "name"),
    [
        pytest.param("images", "../b.jpg", id="up"),
        pytest.param("images", "a/../../b.jpg", id="down and up"),
        pytest.param("images", "/etc/passwd", id="absolute"),
        pytest.param("/data", "/database/b.jpg", id="sibling with the same start"),
        pytest.param("", "../b.jpg", id="up from here"),
        pytest.param(".", "/b.jpg", id="absolute from here"),
        pytest.param("/", "a\0.jpg", id="null byte"),
    ],
)
def test_name_that_leads_out_is_refused_with_file_and_folder(root, name):
    with pytest.raises(
        ValueError, match=r"a\.json names the image .*, which lies outside of the image folder"
    ) as error:
        DataFolder(root, "a.json").path_of(name)
    assert repr(name) in str(error.value)
