from detkit.utils.collect_env import collect_env_info


def test_table_names_what_a_bug_report_needs(monkeypatch):
    monkeypatch.setenv("DETKIT_DATASETS", "/somewhere")
    table = collect_env_info()
    for word in (
        "platform",
        "python",
        "torch",
        "torchvision",
        "faster-coco-eval",
        "CUDA",
        "/somewhere",
    ):
        assert word in table
