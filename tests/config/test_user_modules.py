import argparse
import os
import sys

import pytest

from detkit.config import import_user_modules
from detkit.config.user_modules import add_no_imports
from detkit.utils.errors import ConfigError


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


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Returns a function that writes a module `user_part_c` in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda text: (tmp_path / "user_part_c.py").write_text(text)
    sys.modules.pop("user_part_c", None)


def test_module_is_named_with_its_file_before_it_runs(module, tmp_path, caplog):
    module("import logging; logging.getLogger('mine').warning('it runs')\n")
    import_user_modules(["user_part_c"])
    first, second = (record.getMessage() for record in caplog.records)
    assert first == f"IMPORTS runs code: importing user_part_c from {tmp_path}/user_part_c.py"
    assert second == "it runs"


def test_imports_are_refused_by_the_option(module, monkeypatch):
    monkeypatch.setenv("DETKIT_NO_IMPORTS", "0")
    module("raise AssertionError('it ran')\n")
    parser = argparse.ArgumentParser()
    add_no_imports(parser)
    parser.parse_args(["--no-imports"])
    assert os.environ["DETKIT_NO_IMPORTS"] == "1"
    with pytest.raises(ConfigError, match="run the modules 'user_part_c' .* DETKIT_NO_IMPORTS for"):
        import_user_modules(["user_part_c"])
    import_user_modules([])


def test_module_that_exits_is_named(module):
    module("import sys; sys.exit(0)\n")
    with pytest.raises(ConfigError, match=r"'user_part_c' of IMPORTS ends the program"):
        import_user_modules(["user_part_c"])


@pytest.mark.parametrize("name", [".heads", "", 5, None, "__main__"])
def test_what_is_no_name_of_a_module_is_refused(name):
    with pytest.raises(ConfigError, match="as an import statement does.* got"):
        import_user_modules([name])
