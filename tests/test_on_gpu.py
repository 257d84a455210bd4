"""The benchmark for whoever has a GPU, run on a CPU with tiny models: its table, its failures, and what it does not do
twice."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

from conftest import ROOT


sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

import memory  # noqa: E402
import on_gpu  # noqa: E402


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """Runs the command in this process, with what takes a GPU left out; returns the cells of its table."""
    monkeypatch.setattr(on_gpu, "in_fresh_process", lambda function, *inputs: function(*inputs))
    monkeypatch.setattr(on_gpu.lora, "check_packages", lambda args: None)
    monkeypatch.setattr(on_gpu.lora, "ENCODING_BATCH", 1)
    monkeypatch.setattr(on_gpu, "SHARD", "50KB")  # several files, as of the real sizes
    if not torch.cuda.is_available():
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *a, **k: None)
        monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda *a: {"": "cpu"})

    def run(*words):
        command = [
            "on_gpu.py",
            "--tiny",
            "--device",
            "cpu",
            "--repetitions",
            "1",
            "--output",
            str(tmp_path / "table.md"),
            *words,
        ]
        monkeypatch.setattr(sys, "argv", command)
        with torch.compiler.set_stance("force_eager"):  # torchao's optimiser would be compiled for half a minute
            on_gpu.main()
        assert {path.name for path in tmp_path.iterdir()} == {"table.md", "table.md.json"}  # no weights are left
        lines = (tmp_path / "table.md").read_text().splitlines()
        return {cells[0]: cells for cells in (line.strip("| ").split(" | ") for line in lines[2:] if line[:2] == "| ")}

    return run


@pytest.fixture
def counted(monkeypatch):
    """Replaces what takes time: no weights are written, and each measurement is counted; one of `failing` ends with
    its error."""
    calls, failing = [], {}

    def fake(part):
        def measured(options, case, folder):
            calls.append((part, case.name))
            if case.name in failing and part == "training":
                raise failing[case.name]
            return {key: 2**30 for _, of, key in on_gpu.COLUMNS if of == part}

        return measured

    monkeypatch.setattr(on_gpu, "MEASURES", {part: fake(part) for part in on_gpu.MEASURES})
    monkeypatch.setattr(on_gpu, "save_base", lambda *inputs: None)
    monkeypatch.setattr(on_gpu, "calculate", lambda case: {"training": 2**30, "encoding": 2**30})
    return calls, failing


def test_table_has_all_figures(measure, capsys):
    """An empty column, or a family that cannot be measured, would cost somebody an evening with a GPU for nothing."""
    kinds = ["12gb", "16gb", "24gb"]
    models = {family: name for name, (_, family, *_) in memory.MODELS.items()}.values()
    # of each family one; nf4 and int8 are among them
    recipes = [f"{model}_{kinds[i % 3]}" for i, model in enumerate(models)]
    table = measure("--recipes", *recipes, "z_image_turbo_full *--ema_decay 1.0 --fused*")
    output = capsys.readouterr().out
    headings, rows = table.pop("recipe or full fine-tuning"), list(table.values())
    full = rows.pop(1)
    assert [row[0] for row in rows] == recipes and len(headings) == len(on_gpu.COLUMNS) + 2
    assert all(float(cell) >= 0 for row in rows for cell in row[1:])
    seconds = [i for i, heading in enumerate(headings) if heading.endswith(", s")]
    assert len(seconds) == 4 and all(float(row[i]) > 0 for row in rows for i in seconds)
    # it trains one state; nothing of its own is encoded
    assert [full[i] == "-" for i in seconds] == [
        True,
        False,
        False,
        True,
    ]
    assert all(" | ".join(row) in output for row in [*rows, full])  # as they come


def test_finished_rows_are_not_measured_again(measure, counted):
    """Hours of somebody's GPU, and each row of a run that was stopped, would be lost."""
    calls, _ = counted
    words = ["--models", "z_image_turbo", "--recipes", "*_24gb", "*_12gb"]
    first = measure(*words)
    assert sorted(calls) == sorted((part, f"z_image_turbo_{size}gb") for part in on_gpu.MEASURES for size in (24, 12))
    assert measure(*words) == first and len(calls) == 4
    assert len(measure(*words[:-2], "*_16gb")) == 4 and len(calls) == 6  # another is added
    measure(*words, "--again")
    assert len(calls) == 10


@pytest.mark.parametrize(
    ("error", "cell", "again"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "out of memory", False),
        (RuntimeError("no kernel | for this card"), "failed: RuntimeError: no kernel / for this card", True),
        (BrokenProcessPool("ended"), "killed, most likely for want of the computer's memory", True),
    ],
    ids=["out_of_memory", "failed", "killed"],
)
def test_case_that_ends_early_is_a_row(measure, counted, error, cell, again):
    """One card too small must not cost the rows behind it; what may be mended is tried again, what does not fit is
    not."""
    calls, failing = counted
    failing["flux2_klein_4b_24gb"] = error
    words = ["--models", "flux2_klein_4b", "--recipes", "*gb"]
    table = measure(*words)
    assert cell in table["flux2_klein_4b_24gb"] and not any(
        cell in table[f"flux2_klein_4b_{size}gb"] for size in (16, 12)
    )
    assert len(calls) == 6
    measure(*words)
    assert len(calls) == 6 + again


def test_figures_of_two_machines_are_not_mixed(measure, counted, tmp_path):
    """A table whose rows are of different cards compares nothing."""
    words = ["--models", "z_image_turbo", "--recipes", "*_24gb"]
    measure(*words)
    kept = tmp_path / "table.md.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"about": "another card"}))
    with pytest.raises(SystemExit, match="error: .*another card.*--output"):
        measure(*words)
    kept.write_text("{")
    with pytest.raises(SystemExit, match="error: .*table.md.json: "):
        measure(*words)


def test_only_what_fits_runs(measure, counted, monkeypatch, capsys):
    """A card of 12 GB must not be asked for 20; whoever looks for a row learns why it is not there."""
    monkeypatch.setattr(on_gpu, "card_of", lambda options: ("a card", 12.0))
    monkeypatch.setattr(
        on_gpu, "calculate", lambda case: {"training": (20 if case.args.rank == 64 else 5) * 2**30, "encoding": 1}
    )
    table = measure("--models", "z_image_turbo", "--recipes", "*gb")
    assert [row[:2] for row in table.values()][1:] == [["z_image_turbo_16gb", "12.0"], ["z_image_turbo_12gb", "12.0"]]
    assert "z_image_turbo_24gb: 21.0 GiB by calculation" in capsys.readouterr().out


@pytest.mark.parametrize(("gib", "left"), [(24, 23.5), (79, None), (80, None), (math.inf, None)])
def test_larger_card_stands_for_a_smaller_one(monkeypatch, gib, left):
    """A peak that was allowed more than the card of its row has shows nothing; CUDA's own share is not PyTorch's."""
    fractions = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(78.5 * 2**30), 79 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    args = on_gpu.start(SimpleNamespace(gib=gib, args=SimpleNamespace()), "base")
    assert fractions == ([pytest.approx(left / 79)] if left else []) and args.pretrained_model_name_or_path == "base"


def test_peaks_hold_what_cuda_itself_has(monkeypatch):
    """What the card must have is more than what PyTorch has allocated."""
    for name, gib in {"max_memory_allocated": 10, "max_memory_reserved": 12, "memory_reserved": 11}.items():
        monkeypatch.setattr(torch.cuda, name, lambda gib=gib: gib * 2**30)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (68 * 2**30, 80 * 2**30))
    assert {n: b / 2**30 for n, b in on_gpu.peaks(torch.device("cuda")).items()} == {
        "allocated": 10,
        "reserved": 12,
        "card": 13,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            [], "sees no CUDA card", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
        ),
        (["--device", "cpu"], "give --tiny"),
        (["--tiny", "--device", "cpu", "--work_dir", "nowhere"], "nowhere is no folder: see --work_dir"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(monkeypatch, words, message):
    """A user without a GPU must learn what to do, not read a traceback."""
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", *words])
    with pytest.raises(SystemExit) as caught:
        on_gpu.main()
    assert str(caught.value).startswith("error: ") and message in str(caught.value) and "\n" not in str(caught.value)


def test_disk_that_is_too_small_is_named(measure, monkeypatch):
    """The disk would be full after minutes of writing."""
    monkeypatch.setattr(on_gpu.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(SystemExit, match="error: .*--work_dir"):
        measure("--models", "z_image_turbo", "--recipes", "*_24gb")


def test_each_figure_is_of_a_process_of_its_own():
    """What one case leaves on the card would be counted to the next; a process that the system kills ends no other."""
    assert on_gpu.in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(BrokenProcessPool):
        on_gpu.in_fresh_process(os._exit, 9)


@pytest.mark.slow
def test_command_runs_as_it_stands(tmp_path, subprocess_env):
    """With processes of its own, as a user starts it."""
    words = "--tiny --device cpu --models z_image_turbo --recipes *_24gb --repetitions 1 --output table.md".split()
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "benchmarks" / "on_gpu.py", *words], env=subprocess_env, cwd=tmp_path
    )
    assert run.returncode == 0 and "z_image_turbo_24gb" in (tmp_path / "table.md").read_text()
