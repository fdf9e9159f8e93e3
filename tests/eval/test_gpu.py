"""A GPU for a few minutes, rehearsed: two calls one after the other, by a clock that only what is measured moves."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import tyro

from eval import benchmark, gpu
from tests.processes import child_processes

ABOUT = {
    "device": "NVIDIA H200",
    "platform": "gpu",
    "num_devices": 1,
    "cpu_cores": 16,
    "python": "3.12.3",
    "versions": {"jax": "0.11.2"},
    "commit": "unknown",
}
ROWS = {
    "channel": {"per_second": 3.0, "per_second_quartiles": [2.0, 4.0], "first_call_s": 1.0, "share_of_copy": 0.5}
    | {"bytes_written_per_second": 1e9},
    "codec": {"steps_per_second": 3.0, "steps_per_second_quartiles": [2.0, 4.0], "images_per_second": 5.0}
    | {"ratio_to_eager": 1.0, "compilation_s": 1.0},
    "power": {"steps_per_second": 3.0, "steps_per_second_quartiles": [2.0, 4.0], "compilation_s": 1.0}
    | {"ratio_to_purejaxrl_power": None, "ratio_to_sb3_power": None},
    "system": {"images_per_second": 3.0, "images_per_second_quartiles": [2.0, 4.0], "ratio_to_eager": 1.0}
    | {"first_call_s": 1.0},
    "diffusion": {"seconds": 0.02, "seconds_quartiles": [0.01, 0.03], "flops": 1e12, "flops_per_second": 5e13}
    | {"share_of_matmul": 0.1, "ratio_to_eager": 1.0, "first_call_s": 1.0, "peak_bytes": 2**30},
    "image": {"seconds": 0.5, "seconds_range": [0.4, 0.6], "ratio_to_eager": 1.0, "peak_bytes": 2**30, "steps": 25}
    | {"compilation_s": 1.0, "cached_s": None, "temporary_bytes": 1},
}
"""A row of each stage, but for what names it."""
SECONDS = 60.0
"""What every part takes."""


class Rehearsal:
    """In place of a machine: a part is the call of `eval.benchmark` that it asks for, with rows that are given."""

    def __init__(self, failing=(), failing_peers=(), lost=()):
        """What goes wrong by stage: always, beside other software, and implementations that leave only a note."""
        self.now, self.asked, self.limits = 0.0, [], []
        self.failing, self.failing_peers, self.lost = dict(failing), dict(failing_peers), dict(lost)

    def machine(self):
        return gpu.Machine(lambda environ: dict(ABOUT), self.execute, lambda: self.now)

    def execute(self, command, limit_s, environ):
        args = tyro.cli(benchmark.Arguments, args=command[3:])  # what it asks for exists
        assert environ["JAX_PLATFORMS"] == "cuda,cpu" and limit_s >= SECONDS
        batch = {"diffusion": args.unet_batches, "image": args.image_batches}.get(args.stage, args.batches)[0]
        self.limits.append(limit_s)
        self.asked.append((args.stage, batch, args.ours, args.torch_compile, args.peers))
        problem = self.failing.get(args.stage) or (args.peers and self.failing_peers.get(args.stage))
        self.now += limit_s if gpu.is_late(problem or None) else SECONDS
        if problem:
            return problem
        names = ["megjax"] * args.ours + ["PyTorch, eager"] * args.peers
        names += ["PyTorch, torch.compile"] * (args.peers and args.torch_compile)
        row = {"case": f"{args.stage} of sd15", "batch": batch, "rounds": args.rounds, **ROWS[args.stage]}
        lost = self.lost.get(args.stage)
        rows = [row | {"implementation": name} for name in names if name != lost]
        about = {**ABOUT, "stage": args.stage, "ceilings": {"copy_bytes": 1e12, "matmul_float32": 1e14}}
        about["ceilings"]["matmul_bfloat16"] = 8e14
        about |= {"ceilings": about["ceilings"] if args.ceilings else None}
        result = {**about, "rows": rows, "missing_peers": [], "notes": ["random weights."]}
        result["notes"] += [f"{lost} was not measured: RuntimeError: no memory."] if lost in names else []
        (args.folder / f"{args.stage}-nvidia-h200.json").write_text(json.dumps(result))
        return None


def test_two_calls_measure_everything(tmp_path):
    """A first one that its limit stops, a second one that goes on, and the page of their files."""
    everything = [part.name for part in gpu.PARTS]
    first, second = Rehearsal(), Rehearsal()
    missing = gpu.run(gpu.Arguments(4.5, tmp_path, commit="abc"), first.machine())
    assert [one[:2] for one in first.asked[:3]] == [("diffusion", 2), ("diffusion", 32), ("image", 1)]
    assert 0 < len(missing) < len(everything) and first.now <= 270
    before = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert sum(len(one["parts"]) for one in before.values()) == len(everything) - len(missing)

    assert gpu.run(gpu.Arguments(60, tmp_path, commit="abc"), second.machine()) == []
    assert len(first.asked) + len(second.asked) == len(everything)
    results = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert {name for one in results.values() for name in one["parts"]} == set(everything)
    unet = results["diffusion-nvidia-h200.json"]
    assert unet["commit"] == "abc" and unet["ceilings"]["copy_bytes"] == 1e12
    assert (
        unet["rows"][: len(before["diffusion-nvidia-h200.json"]["rows"])]
        == (before["diffusion-nvidia-h200.json"]["rows"])
    )
    names = [row["implementation"] for row in unet["rows"] if row["batch"] == 2]
    assert names == ["megjax", "PyTorch, eager", "PyTorch, eager, again", "PyTorch, torch.compile"]
    assert gpu.run(gpu.Arguments(60, tmp_path, commit="abc"), second.machine()) == []
    assert len(first.asked) + len(second.asked) == len(everything)

    benchmark.write_tables(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| diffusion | image-steps a second, one guided image | 54.5 eager" in page and "| **no** |" in page
    assert all(f"## {stage}: NVIDIA H200, 16 cores" in page for stage in ROWS)


def test_a_part_that_fails_is_reported_and_measured_last_the_next_time(tmp_path):
    """Where other software may be the reason, it is tried again without."""
    parts = ("channel", "codec", "power", "codec-compiled")
    rehearsal = Rehearsal({"codec": "RuntimeError: no kernel"})
    assert gpu.run(gpu.Arguments(60, tmp_path, parts), rehearsal.machine()) == ["codec", "codec-compiled"]
    assert [one[0] for one in rehearsal.asked] == ["channel", "codec", "codec", "power", "codec"]
    assert [one[-1] for one in rehearsal.asked] == [True, True, False, True, True]
    codec = json.loads((tmp_path / "codec-nvidia-h200.json").read_text())
    assert codec["rows"] == [] and not codec["parts"]["codec"]["measured"]
    problem = "RuntimeError: no kernel"
    assert codec["notes"] == [
        f"Part codec: {problem}; without other software: {problem}.",
        f"Part codec-compiled: {problem}.",
    ]
    benchmark.write_tables(tmp_path, tmp_path / "page.md")
    assert "Part codec-compiled: RuntimeError: no kernel." in (tmp_path / "page.md").read_text()

    again = Rehearsal()
    assert gpu.run(gpu.Arguments(60, tmp_path, ("codec", "system")), again.machine()) == []
    assert [one[0] for one in again.asked] == ["system", "codec"] and again.limits[1] == 3600 - SECONDS
    assert json.loads((tmp_path / "codec-nvidia-h200.json").read_text())["notes"] == [
        "Part codec-compiled: RuntimeError: no kernel.",
        "random weights.",
    ]


def test_a_repeated_part_that_fails_beside_other_software_is_measured_without(tmp_path):
    arguments = gpu.Arguments(60, tmp_path, ("codec",))
    assert gpu.run(arguments, Rehearsal({"codec": "RuntimeError: no kernel"}).machine()) == ["codec"]
    again = Rehearsal(failing_peers={"codec": "RuntimeError: no PyTorch"})
    assert gpu.run(arguments, again.machine()) == []
    assert [one[-1] for one in again.asked] == [True, False] and again.limits == [3600, 3600 - SECONDS]
    codec = json.loads((tmp_path / "codec-nvidia-h200.json").read_text())
    assert [row["implementation"] for row in codec["rows"]] == ["megjax"]
    assert "Part codec: RuntimeError: no PyTorch. Measured without other software." in codec["notes"]


def test_megjax_is_measured_alone_after_a_part_that_took_too_long(tmp_path):
    """In the same call."""
    rehearsal = Rehearsal(failing_peers={"diffusion": f"{gpu.LATE} 150 s"})
    assert gpu.run(gpu.Arguments(60, tmp_path, ("unet-1", "power")), rehearsal.machine()) == []
    assert [(one[0], one[-1]) for one in rehearsal.asked] == [
        ("diffusion", True),
        ("diffusion", False),
        ("power", True),
    ]
    assert rehearsal.limits == [150, 150, 90]  # other parts wait


def test_megjax_alone_comes_first_in_the_next_call(tmp_path):
    """Where it did not fit, or had less than the part's whole limit; what took too long with that comes last."""
    parts = ("unet-1", "channel", "power")
    late = {"diffusion": f"{gpu.LATE} a limit"}
    calls = [Rehearsal(late), Rehearsal(late), Rehearsal(late), Rehearsal()]
    minutes = [3.5, 2, 5, 10]  # the first leaves less than half the part's limit
    missing = [
        gpu.run(gpu.Arguments(m, tmp_path, parts[: 3 * i or 1]), calls[i].machine()) for i, m in enumerate(minutes)
    ]
    assert missing == [["unet-1"], list(parts), ["unet-1"], []]
    asked = [[(one[0], one[-1]) for one in call.asked] for call in calls]
    others = [("channel", True), ("power", True)]
    alone = ("diffusion", False)
    assert asked == [[("diffusion", True)], [alone], [alone, *others], [alone]]
    assert [call.limits[0] for call in calls] == [150, 120, 150, 600]


def test_a_part_is_measured_only_by_the_figure_it_is_about(tmp_path):
    """Rows of other software are kept, but megjax is tried again, and so is torch.compile."""
    parts = ("image-1", "codec-compiled")
    rehearsal = Rehearsal(lost={"image": "megjax", "codec": "PyTorch, torch.compile"})
    assert gpu.run(gpu.Arguments(60, tmp_path, parts), rehearsal.machine()) == list(parts)
    assert [(one[0], one[-1]) for one in rehearsal.asked] == [("image", True), ("image", False), ("codec", True)]
    image = json.loads((tmp_path / "image-nvidia-h200.json").read_text())
    assert [row["implementation"] for row in image["rows"]] == ["PyTorch, eager"]
    problem = "megjax was not measured: RuntimeError: no memory"
    assert f"Part image-1: {problem}; without other software: {problem}." in image["notes"]
    codec = json.loads((tmp_path / "codec-nvidia-h200.json").read_text())
    assert not codec["parts"]["codec-compiled"]["measured"]
    assert [row["implementation"] for row in codec["rows"]] == ["PyTorch, eager"]

    assert gpu.run(gpu.Arguments(60, tmp_path, parts), Rehearsal().machine()) == []
    codec = json.loads((tmp_path / "codec-nvidia-h200.json").read_text())
    names = ["PyTorch, eager", "PyTorch, eager, again", "PyTorch, torch.compile"]
    assert [row["implementation"] for row in codec["rows"]] == names


def test_results_of_another_kind_are_not_added_to(tmp_path):
    machine = Rehearsal().machine()
    gpu.run(gpu.Arguments(60, tmp_path, ("channel",), commit="abc"), machine)
    with pytest.raises(ValueError, match="has commit 'abc' and this is 'unknown'"):
        gpu.run(gpu.Arguments(60, tmp_path), machine)
    (tmp_path / "channel-nvidia-h200.json").write_text("{}")
    with pytest.raises(ValueError, match="eval.gpu's own files, which channel-nvidia-h200.json is not"):
        gpu.run(gpu.Arguments(60, tmp_path), machine)


def test_full_sizes_need_a_gpu(tmp_path):
    machine = gpu.Machine(lambda environ: ABOUT | {"device": "AMD EPYC", "platform": "cpu"}, lambda *_: "failed")
    with pytest.raises(ValueError, match="the device is 'AMD EPYC'; it must be a GPU that JAX can use"):
        gpu.run(gpu.Arguments(60, tmp_path), machine)
    assert gpu.run(gpu.Arguments(60, tmp_path, ("channel",), quick=True), machine) == ["channel"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(parts=("unet-1", "unet-2")), "--parts is 'unet-2'; it must be some of unet-1, unet-16"),
        (dict(minutes=0), "--minutes is 0; it must be more than 0"),
        (dict(output=Path("/dev/null/folder")), "cannot be written"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        gpu.run(gpu.Arguments(**options), Rehearsal().machine())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "limit_s", "problem"),
    [
        ("", 600, None),
        ("import os; print(os.environ['GIVEN'])", 600, None),
        ("raise MemoryError('Out of memory')", 600, "MemoryError: Out of memory"),
        ("raise SystemExit(7)", 600, "ended with code 7"),
        ("import sys; sys.exit('eval.benchmark: --rounds is 2')", 600, "eval.benchmark: --rounds is 2"),
        ("import signal; signal.pause()", 0, "took longer than 0 s"),
    ],
)
def test_processes_of_parts(code, limit_s, problem):
    assert gpu.execute([sys.executable, "-S", "-c", code], limit_s, {"GIVEN": "1"}) == problem


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")
def test_nothing_is_left_of_a_part(tmp_path):
    """A child that reads a pipe, which ends with this test at the latest."""
    known = child_processes()
    os.mkfifo(tmp_path / "pipe")
    with open(os.open(tmp_path / "pipe", os.O_RDWR), "wb"):
        code = f"import os; os.fork() or open({str(tmp_path / 'pipe')!r}).read()"
        assert gpu.execute([sys.executable, "-S", "-c", code], 600, {}) is None
        (orphan,) = child_processes() - known  # this process is its parent now
        assert os.WTERMSIG(os.waitpid(orphan, 0)[1]) == signal.SIGKILL


@pytest.mark.slow
def test_a_machine_without_a_gpu_is_named(monkeypatch):
    def answer(code):
        monkeypatch.setattr(gpu, "ABOUT", (sys.executable, "-S", "-c", code))

    answer("raise RuntimeError('no cuda')")
    with pytest.raises(ValueError, match="JAX cannot use this machine's devices: RuntimeError: no cuda"):
        gpu.about({})
    answer("print('a message'); print('{\"device\": 1}')")
    assert gpu.about({}) == {"device": 1}
    answer("import signal; signal.pause()")
    monkeypatch.setattr(gpu, "ABOUT_LIMIT_S", 0)
    with pytest.raises(ValueError, match="JAX cannot use this machine's devices: took longer than 0 s"):
        gpu.about({})
