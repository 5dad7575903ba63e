import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from detkit.as_detectron2 import AliasError, install


def run(source: str, folder: Path, *arguments: str, **environment: str):
    """Run a script in a process of its own, in its folder."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(source))
    root = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, *arguments, str(script), "an-argument"],
        cwd=folder,
        env={"PYTHONPATH": root, "PATH": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_modules_are_the_same_objects_under_both_names():
    install()
    import detectron2.structures
    from detectron2.config import CfgNode, get_cfg
    from detectron2.engine.defaults import DefaultTrainer

    import detkit
    import detkit.engine
    import detkit.structures

    assert detectron2.structures is detkit.structures
    assert detkit.structures.__spec__.name == "detkit.structures"
    assert DefaultTrainer is detkit.engine.DefaultTrainer
    assert isinstance(get_cfg(), CfgNode)
    assert detectron2.__version__ == "0.6"
    assert detectron2.__file__ == detkit.__file__


def test_missing_module_and_missing_name_are_import_errors():
    install()
    with pytest.raises(ModuleNotFoundError, match="detectron2.no_such_module"):
        import detectron2.no_such_module  # noqa: F401
    with pytest.raises(ImportError, match="no_such_name"):
        from detectron2.data import no_such_name  # noqa: F401


def test_script_runs_as_the_main_program_with_its_arguments(tmp_path):
    source = """
        import sys
        from detectron2.utils.registry import Registry
        if __name__ == "__main__":
            print(sys.argv[1:], Registry.__module__, __file__)
    """
    done = run(source, tmp_path, "-m", "detkit.as_detectron2")
    assert done.stdout.split() == [
        "['an-argument']",
        "detkit.utils.registry",
        str(tmp_path / "script.py"),
    ], done.stderr


def test_processes_that_are_started_anew_know_the_alias(tmp_path):
    source = """
        import multiprocessing
        from detectron2.utils.registry import Registry
        def work(number):
            import detectron2
            return number, detectron2.__version__
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(work, [7]))
    """
    done = run(source, tmp_path, "-m", "detkit.as_detectron2")
    assert done.stdout.strip() == "[(7, '0.6')]", done.stderr


def test_other_python_processes_that_a_script_starts_know_the_alias(tmp_path):
    source = """
        import subprocess, sys
        work = "import detkit, detectron2; print(detectron2.__version__)"
        subprocess.run([sys.executable, "-c", work], check=True)
    """
    done = run(source, tmp_path, "-m", "detkit.as_detectron2")
    assert done.stdout.strip() == "0.6", done.stderr


def test_environment_variable_switches_it_on(tmp_path):
    source = "import detkit\nimport detectron2\nprint(detectron2.__version__)"
    assert run(source, tmp_path, DETKIT_AS_DETECTRON2="1").stdout.strip() == "0.6"
    assert "No module named 'detectron2'" in run(source, tmp_path).stderr


def test_imported_detectron2_is_not_replaced(tmp_path):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("name = 'the real one'")
    done = run("import detectron2\nimport detkit.as_detectron2", tmp_path)
    assert "AliasError: a real detectron2 is imported already, from" in done.stderr
    assert issubclass(AliasError, ImportError)
    done = run(
        "import detkit.as_detectron2\nimport detectron2\nprint(detectron2.__version__)", tmp_path
    )
    assert done.stdout.strip() == "0.6"
    assert f"the one in {package / '__init__.py'} is not used" in done.stderr


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param("detectron2/projects/tiny_project", id="installed"),
        pytest.param("projects/Tiny-Project/tiny_project", id="in_a_checkout"),
        pytest.param("tiny_project", id="beside"),
    ],
)
def test_projects_are_found(folder, tmp_path):
    package = tmp_path / folder
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .config import add_tiny_config")
    (package / "config.py").write_text(
        "from detectron2.config import CfgNode as CN\n"
        "def add_tiny_config(cfg):\n    cfg.MODEL.TINY = CN({'SIZE': 3})\n"
    )
    source = """
        from detectron2.config import get_cfg
        from detectron2.projects import tiny_project
        from detectron2.projects.tiny_project.config import add_tiny_config
        cfg = get_cfg()
        tiny_project.add_tiny_config(cfg)
        print(cfg.MODEL.TINY.SIZE)
    """
    assert run(source, tmp_path, "-m", "detkit.as_detectron2").stdout.strip() == "3"


@pytest.mark.parametrize("folder", ["tools", "projects/Larger-Project"])
def test_a_script_of_a_checkout_finds_its_projects(folder, tmp_path):
    package = tmp_path / "projects" / "Tiny-Project" / "tiny_project"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("SIZE = 5")
    script = tmp_path / folder / "train_net.py"
    script.parent.mkdir(parents=True)
    script.write_text("from detectron2.projects.tiny_project import SIZE\nprint(SIZE)")
    elsewhere = tmp_path / "experiments"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "detkit.as_detectron2", str(script)]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.stdout.strip() == "5", done.stderr


def test_messages_of_detectron2s_loggers_are_shown(tmp_path):
    source = """
        import logging
        from detectron2.utils.logger import setup_logger
        setup_logger()
        logging.getLogger("detectron2.mine").info("a line of the user's")
    """
    done = run(source, tmp_path, "-m", "detkit.as_detectron2")
    assert "a line of the user's" in done.stdout + done.stderr


def test_star_imports_and_functions_named_as_their_modules(tmp_path):
    source = """
        import detkit.as_detectron2
        from detectron2.layers.nms import batched_nms
        from detectron2.layers.roi_align import ROIAlign
        from detectron2.layers import *
        from detectron2.modeling import *
        print(callable(nms), callable(roi_align), Linear.__name__, NaiveSyncBatchNorm.__name__)
        print(BasicStem.__name__, ASPP.__name__, "Sequence" in globals())
        from detectron2.modeling.backbone import *
        print(ResNetBlockBase.__name__)
    """
    done = run(source, tmp_path)
    assert done.stdout.split() == [
        *("True", "True", "Linear", "SyncBatchNorm2d", "BasicStem", "ASPP", "False", "CNNBlockBase")
    ], done.stderr


def test_loggers_of_detectron2_are_those_of_detkit(tmp_path):
    source = """
        import logging
        early = logging.getLogger("detectron2")
        import detkit.as_detectron2
        import detectron2.utils.events
        pairs = [("", ""), (".utils.events", ".utils.events")]
        print([logging.getLogger("detectron2" + a) is logging.getLogger("detkit" + b) for a, b in pairs])
        logging.getLogger("detectron2").setLevel(logging.ERROR)
        print(logging.getLogger("detkit.engine").isEnabledFor(logging.WARNING))
        print(early.parent.name, logging.getLogger("detectron2.mine").parent.name)
    """
    done = run(source, tmp_path)
    assert done.stdout.split("\n") == ["[True, True]", "False", "detkit detkit", ""], done.stderr


@pytest.mark.parametrize("is_installed", [False, True])
def test_colours_of_panopticapi_are_there_for_projects(is_installed, tmp_path):
    if is_installed:
        (tmp_path / "panopticapi").mkdir()
        (tmp_path / "panopticapi" / "utils.py").write_text("def rgb2id(color): return 'its own'")
    source = """
        import detkit.as_detectron2
        from panopticapi.utils import rgb2id
        print(rgb2id([1, 1, 0]))
    """
    assert run(source, tmp_path).stdout.strip() == ("its own" if is_installed else "257")


def test_scripts_can_give_the_device_to_torch(tmp_path):
    (tmp_path / "config.yaml").write_text("MODEL: {DEVICE: auto}")  # as a run without alias dumps
    source = """
        import torch
        from detectron2 import model_zoo
        from detectron2.config import CfgNode, get_cfg

        for num_gpus in (0, 2):
            torch.cuda.device_count = lambda: num_gpus
            cfg, from_file, from_list = get_cfg(), get_cfg(), get_cfg()
            from_file.merge_from_file("config.yaml")
            from_list.merge_from_list(["MODEL.DEVICE", "auto"])
            of_the_zoo = model_zoo.get_config("mask_rcnn_R_50_FPN_3x.yaml")
            trees = cfg, from_file, from_list, of_the_zoo
            print({str(torch.device(t.MODEL.DEVICE)) for t in trees}, cfg.is_set("MODEL.DEVICE"))
        cfg.merge_from_list(["MODEL.DEVICE", "cuda:3"])
        print(cfg.MODEL.DEVICE, torch.cuda.is_initialized())
    """
    done = run(source, tmp_path, "-m", "detkit.as_detectron2", CUDA_VISIBLE_DEVICES="")
    expected = ["{'cpu'} False", "{'cuda'} False", "cuda:3 False"]
    assert done.stdout.splitlines() == expected, done.stderr


def test_without_the_alias_the_machine_at_hand_decides(tmp_path):
    source = """
        import sys
        from detkit.config import get_cfg
        cfg = get_cfg()
        cfg.merge_from_list(["MODEL.DEVICE", cfg.MODEL.DEVICE])
        print(cfg.MODEL.DEVICE, "torch" in sys.modules)
    """
    assert run(source, tmp_path).stdout.split() == ["auto", "False"]
