"""The options of the commands, apart from what the commands do.

Nothing here imports torch, which takes seconds to load: help, completion and mistakes come at once.
"""

import argparse
from collections.abc import Callable

from detkit.config.command_line import (
    Parser,
    add_config_arguments,
    add_machine_arguments,
    default_argument_parser,
)

# Those of the documentation are printed from here. They work as they are, in this order, in an
# empty folder: the quick start generates its images, and the others use what it leaves.
_QUICK_START = "quick_start/faster_rcnn_R_18_FPN_shapes.yaml"
_RUN = "output/quick_start"
_IMAGES = "datasets/shapes/JPEGImages"


def _parser(prog: str | None, description: str, examples: str) -> Parser:
    lines = (f"  {line}" for line in examples.strip().splitlines())
    return Parser(
        prog=prog, description=description, epilog="\n".join(["examples:", *lines]) + "\n"
    )


def _train(prog: str | None) -> argparse.ArgumentParser:
    parser = default_argument_parser(
        epilog=f"""examples:
  detkit train --config-file {_QUICK_START}
  detkit train --config-file {_QUICK_START} --resume
  detkit train --config-file {_QUICK_START} SOLVER.BASE_LR 0.02 SOLVER.MAX_ITER 2000
"""
    )
    parser.prog = prog or parser.prog
    parser.description = "Train a model and evaluate it, as a config describes it."
    _add_report(parser)
    return parser


def _add_report(parser: argparse.ArgumentParser) -> None:
    report_help = "at the end, write the error report into OUTPUT_DIR, as detkit report does"
    parser.add_argument("--report", action="store_true", help=report_help)


def _eval(prog: str | None) -> argparse.ArgumentParser:
    parser = _parser(
        prog,
        "Evaluate a checkpoint: a table of scores, and pictures of predictions beside ground truth."
        "\nThe same as train --eval-only.",
        f"""
detkit eval --weights {_RUN}/model_final.pth
detkit eval --config-file {_RUN}/config.yaml --weights {_RUN}/model_final.pth --dataset shapes_train
""",
    )
    settings = "settings that win over the file, such as TEST.AUG.ENABLED True; last"
    add_config_arguments(parser, required=False, settings=settings)
    weights_help = (
        "checkpoint to evaluate, whatever MODEL.WEIGHTS takes (default: that of the config)."
        " One of a detkit run holds its config, without --config-file. Or an exported"
        " model (.onnx, or OpenVINO's .xml); a config is needed for data sets that it declares"
    )
    parser.add_argument("--weights", "--model", default="", metavar="FILE", help=weights_help)
    dataset_help = "data set to evaluate on, may be repeated (default: DATASETS.TEST)"
    parser.add_argument("--dataset", default=[], action="append", metavar="NAME", help=dataset_help)
    partial_help = "accept weights that do not fill every tensor of the model"
    parser.add_argument("--allow-partial", action="store_true", help=partial_help)
    _add_report(parser)
    add_machine_arguments(parser)
    parser.set_defaults(eval_only=True, resume=False)
    return parser


def _report(prog: str | None) -> argparse.ArgumentParser:
    parser = _parser(
        prog,
        "Show where a detector is wrong, as one page that opens from disk: scores with intervals,"
        " curves, the\nconfusion matrix, what each type of error costs, suggestions, and the images"
        " with the errors drawn in.\nreport.json and CSV files beside it hold the same numbers. It"
        " reads the detections that an\nevaluation has written.",
        f"""
detkit report --run {_RUN}
detkit report --run {_RUN} --compare {_RUN} --output output/compared
detkit report --predictions {_RUN}/inference/coco_instances_results.json --dataset shapes_val
""",
    )
    settings = "settings, such as TEST.IOU_THRESHOLDS [0.5]; last"
    add_config_arguments(parser, required=False, settings=settings)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="folder of a training or an evaluation")
    predictions_help = "detections in COCO's result format; needs --dataset"
    source.add_argument("--predictions", metavar="FILE", help=predictions_help)
    add("--dataset", metavar="NAME", help="the data set (default: the first of DATASETS.TEST)")
    compare_help = "another run, or file of detections, on the same data set"
    add("--compare", metavar="PATH", help=compare_help)
    output_help = "folder for the report (default: `report` in the run, or beside the file)"
    add("--output", metavar="DIR", help=output_help)
    threshold_help = "score from which detections count as found (default: that of the best F1)"
    add("--confidence-threshold", type=float, metavar="SCORE", help=threshold_help)
    images_help = "most images in the page, worst first (default: %(default)s)"
    add("--max-images", "-n", type=int, default=300, metavar="N", help=images_help)
    side_help = "longest side of the images in the page, in pixels (default: %(default)s)"
    add("--image-size", type=int, default=512, metavar="N", help=side_help)
    samples_help = "resamplings of the images behind each interval (default: %(default)s)"
    add("--samples", type=int, default=500, metavar="N", help=samples_help)
    return parser


def _predict(prog: str | None) -> argparse.ArgumentParser:
    parser = _parser(
        prog,
        "Find objects in images and videos, and write pictures, predictions.json and other formats."
        "\nUnder torchrun, the processes share the inputs out.",
        f"""
detkit predict --model {_RUN}/model_final.pth --input {_IMAGES}/val_00000*.jpg --output output/found
detkit predict --model {_RUN}/model_final.pth --input {_IMAGES} --output output/yolo --save yolo
""",
    )
    add = parser.add_argument
    model_help = (
        "checkpoint, whatever MODEL.WEIGHTS takes; one of a detkit run holds its config and class"
        " names. Or an exported model (.onnx, or OpenVINO's .xml), which runs without torch"
    )
    add("--model", "--weights", default="", metavar="FILE", help=model_help)
    settings = (
        "settings, such as MODEL.DEVICE cpu; last. A config that comes with detkit takes the"
        " weights published for it where there are any"
    )
    add_config_arguments(parser, required=False, settings=settings)
    input_help = (
        "images, videos, folders of them, patterns (*, **), addresses, or a camera (camera:0)"
    )
    add("--input", required=True, nargs="+", metavar="PATH", help=input_help)
    output_help = "folder for the pictures and predictions.json, not that of the inputs"
    add("--output", required=True, metavar="DIR", help=output_help)
    save_help = (
        "what is written beside predictions.json: pictures (of a video, a video), coco (coco.json),"
        " csv (predictions.csv), yolo (labels/), labelme (labelme/) (default: pictures)"
    )
    kinds = ("pictures", "coco", "csv", "yolo", "labelme")
    add("--save", nargs="+", choices=kinds, default=["pictures"], metavar="KIND", help=save_help)
    score_help = "lowest score of what is shown and written, 0 to 1 (default: %(default)s)"
    add("--confidence-threshold", type=float, default=0.5, metavar="SCORE", help=score_help)
    classes_help = "names of the classes to show and write (default: all)"
    add("--classes", nargs="+", default=[], metavar="NAME", help=classes_help)
    batch_help = "images of like size that go through the model together (default: %(default)s)"
    add("--batch-size", type=int, default=1, metavar="N", help=batch_help)
    tile_help = (
        "detect in tiles of this side, in pixels of the original image: for huge images and small"
        " objects"
    )
    add("--tile", type=int, default=None, metavar="SIZE", help=tile_help)
    overlap_help = "part of a tile that the next one shows, too (default: 0.2)"
    add("--overlap", type=float, default=None, metavar="PART", help=overlap_help)
    most_help = "only the first N inputs, and of each video only the first N frames"
    add("--max-images", "-n", type=int, default=None, metavar="N", help=most_help)
    resume_help = "go on with a prediction into this folder that was interrupted"
    add("--resume", action="store_true", help=resume_help)
    hide_help = "draw no names and scores into the pictures, as VIS_LABELS False"
    add("--hide-labels", action="store_true", help=hide_help)
    partial_help = "accept weights that do not fill every tensor of the model"
    add("--allow-partial", action="store_true", help=partial_help)
    return parser


def _export(prog: str | None) -> argparse.ArgumentParser:
    parser = _parser(
        prog,
        "Write a trained model as files that run without torch or detkit, with the same numbers.",
        f"""
detkit export --config-file {_RUN}/config.yaml --output deploy MODEL.WEIGHTS {_RUN}/model_final.pth
""",
    )
    settings = "settings, such as MODEL.WEIGHTS model.pth or TEST.DETECTIONS_PER_IMAGE 20; last"
    add_config_arguments(parser, settings=settings)
    add = parser.add_argument
    format_help = "onnx (default), torch_export or openvino; may be repeated"
    add("--format", default=[], action="append", metavar="NAME", help=format_help)
    output_help = "folder for model.onnx, model.pt2, and model.xml with model.bin"
    add("--output", required=True, metavar="DIR", help=output_help)
    dtype_help = "of the images that the model takes (default: uint8 where the resize gives that)"
    add("--input-dtype", choices=("uint8", "float32"), default="", help=dtype_help)
    paste_help = "masks that cover the image, instead of their box (for other languages)"
    add("--paste", action="store_true", help=paste_help)
    eval_help = "print the scores of each file on DATASETS.TEST, beside those of the model"
    add("--eval", action="store_true", help=eval_help)
    int8_help = "write copies that compute in int8, model_int8.*, too, and print scores as --eval"
    add("--int8", action="store_true", help=int8_help)
    fp16_help = "the same in float16, model_fp16.* (onnx, openvino)"
    add("--fp16", action="store_true", help=fp16_help)
    bf16_help = "the same in bfloat16, model_bf16.xml (openvino)"
    add("--bf16", action="store_true", help=bf16_help)
    calibrate_help = (
        "data set that the ranges of activations are taken on, some 30 images, for --int8"
    )
    add("--calibrate", default="", metavar="DATASET", help=calibrate_help)
    return parser


def _show_batch(prog: str | None) -> argparse.ArgumentParser:
    parser = _parser(
        prog,
        "Write pictures of what a model is fed in training, with its annotations drawn: the first"
        " samples of a run,\nafter all augmentation, in their order. The next run of the same SEED"
        " is fed the same pixels.",
        f"""
detkit show-batch --config-file {_QUICK_START} --output output/batch
detkit show-batch --config-file {_QUICK_START} --output output/unflipped INPUT.RANDOM_FLIP none
""",
    )
    add_config_arguments(parser, settings="settings, such as INPUT.RANDOM_FLIP none; last")
    count_help = "number of pictures (default: %(default)s)"
    parser.add_argument("--max-images", "-n", type=int, default=16, metavar="N", help=count_help)
    output_help = "folder for the pictures"
    parser.add_argument("--output", required=True, metavar="DIR", help=output_help)
    return parser


def _check_dataset(prog: str | None) -> argparse.ArgumentParser:
    parser = _parser(
        prog,
        "Look at every image and annotation of a config's training and test data, and hold them"
        " against the config.\nThe exit status is 1 if there are errors, with --strict also if"
        " there are warnings.",
        f"""
detkit check-dataset --config-file {_QUICK_START} --html output/data.html
detkit check-dataset --config-file {_QUICK_START} --fix output/cleaned
""",
    )
    add_config_arguments(parser, settings="settings, such as MODEL.WEIGHTS model.pth; last")
    add = parser.add_argument
    add("--json", default="", metavar="FILE", help="write the report as JSON")
    html_help = "write the report as a page, with pictures of the examples"
    add("--html", default="", metavar="FILE", help=html_help)
    fix_help = "folder for a cleaned copy in COCO's format, and changes.json; empty or not there"
    add("--fix", default="", metavar="OUT", help=fix_help)
    add("--strict", action="store_true", help="exit with 1 on warnings, too")
    workers_help = "processes that decode images (default: one per core, at most 8)"
    add("--workers", type=int, default=None, metavar="N", help=workers_help)
    return parser


def _convert_dataset(prog: str | None) -> argparse.ArgumentParser:
    parser = _parser(
        prog,
        "Bring a data set of any format into that of COCO, VOC or YOLO. Images are copied. What the"
        " format\ncannot hold is named and counted, and the lines for DATASETS.REGISTER are"
        " printed.",
        """
detkit convert-dataset shapes_val output/shapes_as_yolo --to yolo
detkit convert-dataset output/shapes_as_yolo output/shapes_as_voc --to voc
detkit convert-dataset output/shapes_as_yolo/data.yaml output/shapes_as_coco --to coco --link
""",
    )
    input_help = "folder or file, whose format is found out, or name of a known data set"
    parser.add_argument("input", metavar="IN", help=input_help)
    parser.add_argument("output", metavar="OUT", help="folder to write, empty or not there")
    to_help = "format to write"
    parser.add_argument("--to", required=True, choices=("coco", "voc", "yolo"), help=to_help)
    config_help = "config whose data sets IN may name"
    parser.add_argument("--config-file", default="", metavar="FILE", help=config_help)
    parser.add_argument("--link", action="store_true", help="link images instead of copying them")
    return parser


class _IntermixedParser(Parser):
    # Its settings may come before, between and after the options.
    parse_args = Parser.parse_intermixed_args


def _convert_weights(prog: str | None) -> argparse.ArgumentParser:
    parser = _IntermixedParser(
        prog=prog,
        description=(
            "Rename weights of others to detkit's names, or change their format.\nThe exit status"
            " is 1 if a model was given and the weights do not fill it, 2 for a mistake in the\n"
            "command or the file."
        ),
        epilog=f"""examples:
  detkit convert-weights {_RUN}/model_final.pth output/model.safetensors
  detkit convert-weights {_RUN}/model_final.pth output/model.pth --config-file {_QUICK_START}
  detkit convert-weights torchvision://fasterrcnn_resnet50_fpn output/frcnn.pth
""",
    )
    add = parser.add_argument
    add("input", metavar="IN", help="file or address: whatever MODEL.WEIGHTS takes")
    output_help = ".pth, .safetensors, or .pkl (Detectron2's pickle of arrays)"
    add("output", metavar="OUT", help=output_help)
    config_help = "compare with this model, and write only what it takes"
    add("--config-file", default="", metavar="FILE", help=config_help)
    eps_help = (
        "eps of the frozen batch norms that the weights were trained with, where it is not 1e-5"
    )
    add("--frozen-bn-eps", type=float, metavar="EPS", help=eps_help)
    add("opts", nargs="*", metavar="KEY VALUE", help="settings over the config file")
    return parser


def _configs(prog: str | None) -> argparse.ArgumentParser:
    parser = _parser(
        prog,
        "List the configs that come with detkit, a line each.",
        """
detkit configs
detkit configs mask
""",
    )
    word_help = "only those with it in their name, such as own_data or mask"
    parser.add_argument("word", nargs="?", default="", metavar="WORD", help=word_help)
    return parser


def _config(prog: str | None) -> argparse.ArgumentParser:
    parser = _parser(
        prog,
        "Explain settings, show those of a config, or compare two configs.",
        f"""
detkit config explain SOLVER.BASE_LR
detkit config show --changed {_QUICK_START}
detkit config diff faster_rcnn_R_50_FPN_1x faster_rcnn_R_50_FPN_3x
""",
    )
    file_help = "YAML file, or the name of a config that comes with detkit"
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    explain = actions.add_parser("explain", help="meaning, default and legal values of settings")
    key_help = "a setting, such as SOLVER.BASE_LR, or a group of them, such as SOLVER"
    explain.add_argument("keys", nargs="+", metavar="KEY", help=key_help)
    show = actions.add_parser("show", help="all settings of a config with those of its _BASE_")
    show.add_argument("file", metavar="FILE", help=file_help)
    changed_help = "only those that differ from their defaults"
    show.add_argument("--changed", action="store_true", help=changed_help)
    diff = actions.add_parser("diff", help="settings in which two configs differ, a line each")
    for name in ("A", "B"):
        diff.add_argument(name.lower(), metavar=name, help=file_help)
    return parser


def _env(prog: str | None) -> argparse.ArgumentParser:
    description = "Print versions, devices and environment variables, for a bug report."
    return _parser(prog, description, "detkit env")


def _completion(prog: str | None) -> argparse.ArgumentParser:
    parser = _parser(
        prog,
        "Print a script that lets the Tab key complete commands, options, configs and settings.\n"
        "Into ~/.bashrc (or, with zsh for bash, into ~/.zshrc) goes the line\n\n"
        '  eval "$(detkit completion bash)"\n\nand fish reads a file.',
        """
detkit completion bash
detkit completion zsh
detkit completion fish > ~/.config/fish/completions/detkit.fish
""",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="your shell")
    return parser


# Command -> function of the program's name that returns its parser.
PARSERS: dict[str, Callable[[str | None], argparse.ArgumentParser]] = {
    "train": _train,
    "eval": _eval,
    "report": _report,
    "predict": _predict,
    "export": _export,
    "show-batch": _show_batch,
    "check-dataset": _check_dataset,
    "convert-dataset": _convert_dataset,
    "convert-weights": _convert_weights,
    "configs": _configs,
    "config": _config,
    "env": _env,
    "completion": _completion,
}
