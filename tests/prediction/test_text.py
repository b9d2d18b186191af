from __future__ import annotations

import re

from helpers.programs import compose

from evomoe.cli import quote_text
from evomoe.prediction import predict
from evomoe.prediction.text import equal_ones_together


def write(trained, *overrides: str) -> list[str]:
    return predict(compose(f"log_dir={trained.logs}", "max_new_tokens=8", *overrides, config="generate"))


def test_what_is_written_begins_with_the_prompt_and_is_printed_unchanged(trained, capsys):
    prompt = "def f(x): # [not markup] :smile: " + "a long line that a terminal would wrap " * 3
    (text,) = write(trained, quote_text(f"prompt={prompt}"))
    assert text.startswith(prompt)
    assert text != prompt
    assert re.sub(r"[\a\b\v\f\r]", "", text) in capsys.readouterr().out  # control codes do not reach the terminal


def test_several_prompts_are_continued_each_by_itself(trained):
    both = write(trained, 'prompt=["The value ","If "]', "seed=3")
    assert [both[0][:10], both[1][:3]] == ["The value ", "If "]
    assert both == write(trained, 'prompt=["The value ","If "]', "seed=3")
    assert both == [*write(trained, 'prompt="The value "', "seed=3"), *write(trained, 'prompt="If "', "seed=3")]
    assert both != write(trained, 'prompt=["The value ","If "]', "seed=4")
    greedy = [write(trained, 'prompt="If "', "temperature=0", f"seed={seed}") for seed in (3, 4)]
    assert greedy[0] == greedy[1]


def test_a_file_is_continued_line_by_line_and_the_same_in_any_batches(trained, tmp_path):
    prompts = ["If ", "The value ", "If ", "A", "If "]
    (tmp_path / "in.txt").write_text("\n".join([prompts[0], "", *prompts[1:]]) + "\n")
    quoted = ",".join(f'"{prompt}"' for prompt in prompts)
    expected = write(trained, f"prompt=[{quoted}]")
    assert len({expected[0], expected[2], expected[4]}) == 3  # equal prompts go on in different ways
    for size in (1, 2, 32):
        assert write(trained, f"prompt_file={tmp_path / 'in.txt'}", f"batch_size={size}") == expected


def test_equal_prompts_share_a_batch():
    prompts = [[1], [2, 3], [1], [4], [5], [1]]
    assert equal_ones_together(prompts, 2) == [[0, 2, 5], [1, 3], [4]]
    assert equal_ones_together(prompts, 9) == [[0, 2, 5, 1, 3, 4]]


def test_the_experts_of_each_token_are_shown(trained, capsys):
    write(trained, 'prompt="If "', "show_experts=true")
    rows = [line for line in capsys.readouterr().out.splitlines() if re.search(r"\d:\d\.\d\d", line)]
    assert len(rows) == len(trained.data.tokenizer.encode("If ")) + 8
    assert all(re.search(r"│ [0-3]:[01]\.\d\d +│$", row) for row in rows)  # hardened: one expert a token
