"""bench.py: rows say what is compared, and on which machines their target holds."""

import pytest
import torch
from helpers import refused

import bench
from configurator import Run, configure


def test_every_claim_says_what_it_compares_and_where_it_holds():
    for claim, targets in bench.CLAIMS.items():
        assert claim.__doc__ and targets, claim
        assert set(targets) <= {"avx2", "bf16", "cuda"}
        assert len({target[:2] for target in targets.values()}) == 1  # all one way


def test_ratios_are_turn_by_turn_and_in_the_direction_of_the_target(tmp_path, monkeypatch):
    def leaner(run):
        """A thing."""
        return bench.Measured([1.0, 2.0, 3.0], [4.0, 4.0, 4.0], unit="GB")

    run = Run(bench.Config(out_dir=str(tmp_path), dtype="float32", device="cpu"))
    for target, ratio in (("<= 0.6", "0.5 (0.25 to 0.75)"), (">= 2", "2 (1.33 to 4)")):
        monkeypatch.setitem(bench.CLAIMS, leaner, {"avx2": target})
        row = bench.measure(run, leaner)
        assert row["ratio"] == ratio and row["target"] == target and row["ours"] == "2 GB"
    assert "| `leaner`: A thing. | 2 GB | 4 GB |" in bench.markdown(bench.pd.DataFrame([row]))


def test_claims_by_name_are_measured(tmp_path, capsys):
    bench.main(configure(bench.Config, ["claims=word_auc", f"out_dir={tmp_path}"]))
    table = (tmp_path / "bench.md").read_text()
    assert "`word_auc`: AUC of 1,000 words" in table and len(table.splitlines()) == 3


@pytest.mark.parametrize(
    "option, says",
    [
        ("claims=swop", ["swop", "did you mean 'swap'"]),
        pytest.param(
            "gpu=True",
            ["make gpu needs a CUDA GPU"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_measured_ends_in_a_sentence(tmp_path, option, says):
    refused("bench", option, f"out_dir={tmp_path}", says=says)
