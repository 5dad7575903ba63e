import sys

import pytest

from detkit.config import import_user_modules


def test_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "user_part_a.py").write_text("LOADED = 1\n")
    import_user_modules(["user_part_a"])
    assert sys.modules.pop("user_part_a").LOADED == 1


def test_missing_module_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(
        ModuleNotFoundError, match=f"IMPORTS names 'not_there.x', which is not found.*{tmp_path}"
    ):
        import_user_modules(["not_there.x"])


def test_error_inside_the_module_is_not_disguised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "user_part_b.py").write_text("import no_such_package_of_mine\n")
    with pytest.raises(ModuleNotFoundError, match="^No module named 'no_such_package_of_mine'"):
        import_user_modules(["user_part_b"])


def test_nothing_to_import_leaves_the_path_alone():
    before = list(sys.path)
    import_user_modules([])
    assert sys.path == before
