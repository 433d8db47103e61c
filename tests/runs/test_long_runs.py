"""A long run holds no more memory and no more files at its end than near its beginning."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tokenrl
from toy_tasks.models import TinyModel

pytestmark = pytest.mark.slow

PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory is read from /proc")
def test_1000_steps_keep_memory_and_open_files_level(tmp_path):
    held = []

    def reward(completions, **_):
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE  # MiB
        held.append((resident, len(os.listdir("/proc/self/fd"))))
        return [text.count("a") / max(1, len(text)) for text in completions]

    tokenrl.train(
        model=TinyModel(tuple("abcd>"), layers=1, hidden=16, heads=2, context=16)(0),
        task=[{"prompt": f"{x}{y}>"} for x in "abcd" for y in "abcd"],
        reward=reward,
        output_dir=tmp_path / "run",
        max_steps=1000,
        prompts_per_step=2,
        num_generations=2,
        max_completion_length=2,
        eval_every=100,
        save_every=100,
        stop_after_zero_spread=0,
        quiet=True,
    )
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1001
    (early, files), (late, files_late) = held[len(held) // 4], held[-1]
    assert late < early + 40, f"{early:.0f} MiB became {late:.0f} MiB"
    assert files_late <= files + 2
