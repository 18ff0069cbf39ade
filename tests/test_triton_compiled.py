"""The kernels in Triton compiled for real architectures, without a GPU: nothing is spilled, and loads are wide.

``python -m tests.test_triton_compiled 90`` prints what a kernel takes, one JSON object per line.
"""

import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = [80, 90, 120]
LARGE = (4, 64, 1 << 26)  # 2^34 elements; nothing touches them


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(architecture, tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    command = [sys.executable, "-m", "tests.test_triton_compiled", str(architecture)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kernel"] for one in found} == {
        "score_tiles", "join_chunks", "moments_of_tiles", "join_moments", "normalise", "sums_of_tiles", "join_sums",
        "input_gradient", "move_running",
    }  # fmt: skip
    for one in found:
        assert one["spilled"] == 0, one
        assert one["registers"] * one["warps"] * 32 <= 65536, one
        if one["kernel"] in ("score_tiles", "moments_of_tiles", "normalise", "sums_of_tiles", "input_gradient"):
            assert "ld.global.v4.b32" in one["loads"] or one["case"].endswith("odd"), one


def compiled(architecture: int) -> None:
    """Runs every launcher with a driver that knows the architecture alone; launches become compilations."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(Driver())
    triton.knobs.nvidia.dump_ptxas_log = True
    run, seen, case = JITFunction.run, set(), ""

    def compile_only(self, *arguments, grid, warmup, **options):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash in seen:
            return
        seen.add(kernel.hash)
        said = log.getvalue()
        facts = {
            "kernel": self.__name__,
            "case": case,
            "warps": kernel.metadata.num_warps,
            "registers": int(re.search(r"Used (\d+) registers", said)[1]),
            "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
            "loads": sorted(set(re.findall(r"ld\.global[\w.]*", kernel.asm["ptx"]))),
        }
        print(json.dumps(facts), flush=True)

    JITFunction.run = compile_only
    from taylorkern.backends import triton_batch_norm as forward
    from taylorkern.backends import triton_batch_norm_backward as backward
    from taylorkern.backends import triton_scores, triton_tuning

    def everything(sizes, dtype, last, activation, told, tensor):
        N, C, _ = sizes
        v = torch.empty(C)
        s = torch.empty(N, C)
        mask = torch.empty(1, dtype=torch.bool) if told == "mask" else None
        y = tensor if told == "y" else None
        residual = None if told == "x" else tensor
        triton_scores.channel_scores(sizes, last, tensor, tensor, s)
        forward.batch_norm_act(sizes, last, tensor, residual, v, v, tensor, mask, v, v, 1e-5, True, activation, 0.1)
        for training in (True, False):
            backward.batch_norm_act_backward(
                sizes, last, tensor, tensor, mask, y, v, v, v, v, tensor, residual, v, v, s,
                1e-5, training, activation, 0.1,
            )  # fmt: skip

    forward.follow(*[torch.empty(64)] * 4, 0.1, 1.0)
    for config, last in itertools.product(triton_tuning.CONFIGS, (True, False)):
        triton_tuning._chosen.clear()
        forward.normalise_tuned.configs = backward.input_gradient_tuned.configs = [config]
        usual = config is triton_tuning.USUAL
        for dtype in (torch.bfloat16, torch.float32) if usual else (torch.bfloat16,):
            tensor = torch.empty(1, dtype=dtype)
            for activation, told in ((1, "x"), (1, "y"), (2, "mask"), (4, "x")) if usual else ((1, "y"),):
                case = f"{dtype} {last} {activation} {told}"
                everything((256, 64, 3136), dtype, last, activation, told, tensor)
            case = f"{dtype} {last} odd"
            everything((256, 131, 49), dtype, last, 2, "mask", tensor)
        if usual:
            case = f"{dtype} {last} large"
            everything(LARGE, torch.float32, last, 1, "x", torch.empty(1))


if __name__ == "__main__":
    compiled(int(sys.argv[1]))
