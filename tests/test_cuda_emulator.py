"""The emulator itself: what it says of small kernels that are wrong, and of some that are right."""

import subprocess
from pathlib import Path

import pytest

from tests import emulated

PROGRAM = Path(__file__).parent / "cpp" / "cuda_emulator.cpp"
SANITIZE = ["-fsanitize=address", "-fno-sanitize-recover=all"]
THREADS = 96
ORDERS = range(6)

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no g++ on PATH")


def built(folder: Path, flags: list[str], of_kernels: list[str] | None = None) -> Path:
    kernels = emulated.objects(folder, [PROGRAM], of_kernels or flags)
    made = emulated.objects(folder, emulated.EMULATOR, flags)
    return emulated.link([*kernels, *made], folder / "program", [f for f in flags if f in SANITIZE])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return built(tmp_path_factory.mktemp("plain"), ["-O1"])


@pytest.fixture(scope="module")
def watching(tmp_path_factory) -> Path:
    return built(tmp_path_factory.mktemp("watching"), emulated.WATCHING, emulated.WATCHED)


def said(program: Path, kernel: str, order: int = 0) -> str:
    ran = subprocess.run([str(program), kernel, str(order)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, f"{ran.returncode}: {ran.stderr[-2000:]}"
    return ran.stdout.strip()


def numbers(program: Path, kernel: str, order: int = 0) -> list[float]:
    return [float(v) for v in said(program, kernel, order).split()]


def shuffled() -> list[float]:
    def inside(source: int, thread: int, width: int) -> int:
        return source if source < thread % 32 // width * width + width else thread % 32

    def value(t: int) -> int:
        lane, first = t % 32, t - t % 32
        down, xor = inside(lane + 3, t, 8), inside(lane ^ 9, t, 8)
        return (first + down) + 100 * (first + lane // 16 * 16 + 5) + 10000 * (first + xor)

    return [value(t) for t in range(THREADS)]


RIGHT = {
    "block_sums": [4656 * (r + 1) for _ in range(3) for r in range(4)],
    "neighbours": [t ^ 1 for t in range(THREADS)],
    "shuffles": shuffled(),
    "three_dimensions": [100 * b + t for b in range(6) for t in range(24)],
}


@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels_are_right_in_every_order(plain, watching, kernel):
    for order in ORDERS:
        for program in (plain, watching):
            got = numbers(program, kernel, order)
            assert got == RIGHT[kernel] + [-1] * (len(got) - len(RIGHT[kernel]))


RACES = ["no_barrier_behind_writing", "no_barrier_behind_reading", "neighbours_do_not_meet", "block_order"]


@pytest.mark.parametrize("kernel", RACES)
def test_races_change_results_between_orders(plain, kernel):
    assert len({said(plain, kernel, order) for order in ORDERS}) > 1


@pytest.mark.parametrize("kernel", RACES)
def test_races_are_found_in_every_order(watching, kernel):
    for order in ORDERS:
        assert "no barrier orders the two" in said(watching, kernel, order)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("some_return", "40 at __syncthreads"),
        ("two_barriers", "32 at __syncthreads"),
        ("barrier_and_shuffle", "thread 7: at __syncthreads"),
        ("lane_missing", "at __shfl_xor_sync"),
        ("half_a_warp", "at __shfl_xor_sync"),
        ("masks_differ", "at __shfl_xor_sync"),
        ("lane_outside_the_mask", "lane 0 reads from lane 16, which is not in the mask 0000ffff"),
        ("writes_behind_shared", "has written to byte 384 of its shared memory, which has 384"),
        ("misaligned", "__stcs of a misaligned address"),
        ("too_many_threads", "cudaErrorInvalidConfiguration"),
        ("too_many_rows", "cudaErrorInvalidConfiguration"),
        ("too_much_shared", "cudaErrorInvalidConfiguration"),
        ("no_blocks", "cudaErrorInvalidConfiguration"),
    ],
)
def test_what_a_device_would_not_do_is_an_error(plain, kernel, message):
    for order in ORDERS:
        assert message in said(plain, kernel, order)


def test_shared_memory_is_not_zero_before_it_is_written(plain):
    assert "nan" in said(plain, "reads_unwritten")
    assert not [v for v in numbers(plain, "reads_unwritten")[:THREADS] if v == v]


@pytest.mark.parametrize("kernel", ["reads_behind_shared", "writes_behind_shared"])
def test_the_address_sanitizer_sees_where_shared_memory_ends(tmp_path, kernel):
    try:
        program = built(tmp_path, ["-O1", *SANITIZE])
    except RuntimeError as error:
        pytest.skip(f"no address sanitizer: {error}")
    assert numbers(program, "block_sums", 3)[:12] == RIGHT["block_sums"]
    ran = subprocess.run([str(program), kernel, "0"], capture_output=True, text=True, timeout=60)
    assert "use-after-poison" in ran.stderr and ran.returncode != 0


def test_the_portable_way_to_switch_stacks_is_as_good(tmp_path):
    program = built(tmp_path, ["-O1", "-DEMULATOR_UCONTEXT"])
    for kernel, expected in RIGHT.items():
        assert numbers(program, kernel, 3)[: len(expected)] == expected
