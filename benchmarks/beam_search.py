"""Time the beam search against `generate` of Hugging Face on a Marian model of the same size and weights.

    python benchmarks/beam_search.py [--quick] [--output beam_search.md]

Both translate the same sentences to the same tokens, which is checked. They take turns within a round; a ratio is the
median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import Check, Section, facts, median_ratio

from evomoe.callbacks.console.summary import markdown
from evomoe.models.beam_search import beam_search

VOCABULARY = 8000
SHORTEST, LONGEST = 8, 24
"""Tokens of a source."""

LIMIT = 32
"""Most tokens of a translation."""


def compare(d_model: int, num_layers: int, vocab_size: int, cases: list[tuple[int, int]], rounds: int) -> Section:
    """Both on the same sentences; a section that says so where transformers is missing.

    Args:
        d_model: width D.
        num_layers: blocks of each stack.
        vocab_size: tokens V.
        cases: beam width and sentences of a batch.
        rounds: of which the first does not count.
    """
    try:
        import transformers
    except ImportError as error:
        return Section(f"### Beam search\n\nSkipped: {error}.\n", [])
    from marian import END, twins

    transformers.logging.set_verbosity_error()
    ours, theirs = twins(vocab_size, 64, d_model, num_layers, d_model // 32, std=1.2 * d_model**-0.5)
    rows, checks = [], []
    for beam, batch in cases:
        lengths = torch.randint(SHORTEST, LONGEST + 1, (batch,))
        lengths[0] = LONGEST
        sources = torch.randint(1, vocab_size, (batch, LONGEST))
        real = torch.arange(LONGEST) < lengths[:, None]
        sources[~real] = END
        plain = [row[valid].tolist() for row, valid in zip(sources, real, strict=True)]

        def run_ours(beam: int = beam, plain: list[list[int]] = plain) -> list[list[int]]:
            found = beam_search(ours, plain, begin_id=END, end_id=END, beam=beam, max_length=LIMIT)
            return [list(hypotheses[0].tokens) for hypotheses in found]

        def run_theirs(beam: int = beam, sources: torch.Tensor = sources, real: torch.Tensor = real) -> list[list[int]]:
            with torch.inference_mode():
                output = theirs.generate(
                    input_ids=sources, attention_mask=real.long(), num_beams=beam, max_new_tokens=LIMIT, do_sample=False
                )
            return [[*row, END][: [*row, END].index(END)] for row in output[:, 1:].tolist()]

        same = sum(mine == other for mine, other in zip(run_ours(), run_theirs(), strict=True))
        times = take_turns({"ours": run_ours, "theirs": run_theirs}, rounds)
        ratio = median_ratio(times["theirs"], times["ours"])
        size = f"beam {beam}, batch {batch}"
        medians = [f"{statistics.median(times[name]):.2f}" for name in ("ours", "theirs")]
        rows.append([size, *medians, f"{ratio:.2f}", f"{same} of {batch}"])
        checks.append(Check("Hugging Face to ours", size, ratio, 1.0, at_least=True))
    header = [f"D={d_model}, {num_layers} + {num_layers} layers, V={vocab_size}", "ours s", "Hugging Face s"]
    header += ["Hugging Face to ours", "equal translations"]
    version = f"With transformers {transformers.__version__}.\n\n"
    return Section(f"### Beam search\n\n{version}{markdown(header, rows)}", checks)


def take_turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in random.sample(list(contenders), len(contenders)):
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: does it run?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="also write the Markdown here")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    if args.quick:
        section = compare(32, 1, 100, [(1, 4), (5, 4)], rounds=2)
    else:
        section = compare(256, 3, VOCABULARY, [(1, 32), (5, 1), (5, 32)], args.rounds)
    rounds = 2 if args.quick else args.rounds
    targets = markdown(["ratio of times", "size", "measured", "target", ""], [check.row() for check in section.checks])
    head = f"## Beam search\n\n{facts('cpu', f'fp32, {rounds} rounds')}\n"
    text = f"{head}{targets}\n{section.text}"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
