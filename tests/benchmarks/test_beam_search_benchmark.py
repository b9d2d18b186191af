"""The beam search against Hugging Face's: the same translations by the same weights, and a benchmark that runs."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evomoe.models.beam_search import beam_search

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def marian(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(FOLDER))
    import marian

    return marian


@torch.no_grad()
@pytest.mark.parametrize(("beam", "limit", "penalty"), [(1, 12, 1.0), (4, 12, 1.0), (4, 30, 0.6), (3, 30, 0.0)])
def test_all_hypotheses_and_scores_are_those_of_hugging_face(marian, beam, limit, penalty):
    torch.manual_seed(1)
    ours, theirs = marian.twins(23, 40, 64, 2, 4, std=0.12)
    sources = torch.randint(1, 23, (6, 9))
    sources[1, 5:] = sources[4, 2:] = marian.END
    real = sources != marian.END
    found = beam_search(
        ours,
        [row[row != marian.END].tolist() for row in sources],
        begin_id=marian.END,
        end_id=marian.END,
        beam=beam,
        length_penalty=penalty,
        max_length=limit,
        n_best=beam,
    )
    output = theirs.generate(
        input_ids=sources,
        attention_mask=real.long(),
        num_beams=beam,
        num_return_sequences=beam,
        max_new_tokens=limit,
        length_penalty=penalty,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ends = 0
    for sentence, rows in zip(found, output.sequences[:, 1:].view(6, beam, -1).tolist(), strict=True):
        for hypothesis, row in zip(sentence, rows, strict=True):
            ended = marian.END in row
            assert list(hypothesis.tokens) == (row[: row.index(marian.END)] if ended else row)
            ends += ended
    if limit == 30:
        assert ends > 0
    if beam > 1:
        scores = torch.tensor([[hypothesis.score for hypothesis in sentence] for sentence in found])
        torch.testing.assert_close(scores.flatten(), output.sequences_scores)


def test_without_the_peer_it_says_so(monkeypatch, capsys):
    import evomoe.callbacks.console.summary  # noqa: F401  # and with it torchmetrics, which imports the peer if it can

    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["beam_search.py", "--quick"])
    runpy.run_path(str(FOLDER / "beam_search.py"), run_name="__main__")
    assert "Skipped: import of transformers halted" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_reports_a_ratio(marian, tmp_path):
    command = [sys.executable, str(FOLDER / "beam_search.py"), "--quick", "--output", str(tmp_path / "beam.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "beam.md").read_text()
    assert "| beam 5, batch 4 |" in report
    assert "| >= 1.00 |" in report
