"""What runs on a rented GPU: a list of parts. Seconds are limits; most parts end long before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MUST, SHOULD, MAY = 1, 2, 3  # how important a part is

OURS, LAUNCHED, COMPILED = "patchlight", "patchlight launched", "patchlight compiled"
OFFICIAL, OFFICIAL_COMPILED = "official eager", "official compiled + SDPA"


@dataclass(frozen=True)
class Part:
    """A command with its limit. In its words, {python}, {folder} and {cores} stand for what this machine has."""

    name: str  # also of the file of its output
    command: tuple[str, ...]
    seconds: int  # its limit
    importance: int = MUST
    needs: tuple[str, ...] = ()  # programs, or importable modules with a dot in their names
    environment: tuple[tuple[str, str], ...] = ()
    rows: str = ""  # the CSV that it writes into the folder, from which its result is read

    def words(self, **values: str) -> list[str]:
        return [word.format(**values) for word in self.command]


def in_order(parts: Iterable[Part]) -> list[Part]:
    """By importance, else as they are listed."""
    return sorted(parts, key=lambda part: part.importance)


def sums(parts: Sequence[Part]) -> list[int]:
    """The seconds until the end of each part if all before it need their limits."""
    total, found = 0, []
    for part in parts:
        total += part.seconds
        found.append(total)
    return found


def pick(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """The parts of these names, in the plan's order; without names, all."""
    known = [part.name for part in parts]
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(
            f"gpu: --only must name parts of the plan, got {', '.join(unknown)}; choose among {', '.join(known)}."
        )
    return [part for part in parts if not names or part.name in names]


def selected_tests(
    name: str, paths: str, selected: str, seconds: int, importance: int = MUST, processes: str = "8"
) -> Part:
    """Tests on several processes, which all use the one GPU."""
    command = ("{python}", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", processes, "--dist", "worksteal")
    return Part(name, (*command, *paths.split(), "-k", selected), seconds, importance)


def step(
    method: str,
    seconds: int,
    importance: int = MUST,
    batch: int = 64,
    arch: str = "vit_small",
    providers: tuple[str, ...] = (OURS, OFFICIAL, LAUNCHED),
    name: str = "",
) -> Part:
    """Whole steps of a method, and a profile of each of ours."""
    name = name or f"step_{method}_{arch}_B{batch}"
    size = "--method", method, "--batch", str(batch), "--arch", arch, "--seconds", "3"
    out = "--out", f"{{folder}}/{name}.csv", "--profiles", "{folder}"
    command = "{python}", "-m", "bench", "step", *size, *out, "--providers", *providers
    return Part(name, command, seconds, importance, rows=f"{name}.csv")


def ops(name: str, peers: str, cases: str, seconds: int, importance: int = MUST) -> Part:
    """Ops against their peers."""
    out = f"{{folder}}/{name}.csv"
    command = "{python}", "-m", "bench.gpu.ops_slice", "--out", out, "--peers", peers, "--cases", *cases.split()
    return Part(name, command, seconds, importance, rows=f"{name}.csv")


def program(name: str, seconds: int, importance: int = MUST, rows: str = "") -> Part:
    """A program of this folder, which gets the folder of results."""
    return Part(name, ("{python}", "-m", f"bench.gpu.{name}", "{folder}"), seconds, importance, rows=rows)


OWN_MEMORY = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # so that a tool sees where each tensor ends


def sanitizer(tool: str) -> Part:
    """Forward and backward of every op's second test case under a tool of compute-sanitizer."""
    run = "{python}", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_every_op.py"
    selected = "-k", "repeats_bit_for_bit and cuda-cuda"
    command = "compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", "9", *run, *selected
    return Part(tool, command, 90, SHOULD, needs=("compute-sanitizer",), environment=OWN_MEMORY)


# One case per op first, as in a step with batch 64; then the other sizes. The suite times adamw with copies of all it changes:
# the part `update` is its measurement.
FIRST_CASES = """
    query_attention:M128-197+36-H6-E64 self_relation:S1-B128-H6-N169-E64 neighbor_topk:B512-14x14-D384-3x3-k4-wrap
    class_attention:M128-N196-Q196-H6-E64-k4 photometric:M1024-96x96-blur50 block_masks:V2-B64-14x14-block
"""
MORE_CASES = """
    query_attention:M64-785+36-H6-E64 query_attention:M128-197+144-H6-E64-crop36 self_relation:S1-B128-H1-N384-E196-F196
    self_relation:S8-B128-H1-N384-E36-F196 neighbor_topk:B128-14x14-D384-3x3-k4-wrap neighbor_topk:B512-14x14-D384-all-k4-wrap
    class_attention:M512-N36-Q36-H6-E64-k4 photometric:M128-224x224-blur100 square_sums:vit-small
    neighbor_topk:B512-14x14-D384-5x5-k4-wrap neighbor_topk:B128-28x28-D384-3x3-k4-wrap self_relation:S1-B1024-H6-N36-E64
    prototype_ce:S10-T2-R64-D256-K65536
"""
GRAPH_TESTS, COMPILE_TESTS, OP_TESTS = "tests/engine/test_graph.py", "tests/engine/test_compile.py", "tests/ops"
LOADER = (
    "{python}", "-m", "bench", "loader", "--images", "256", "--batch", "128", "--cores", "{cores}", "--seconds", "3",
    "--rounds", "1", "--modes", "files", "--out", "{folder}/loader.csv",
    "--providers", "patchlight dali", "patchlight torchvision",
)  # fmt: skip
UPDATE = "{python}", "-m", "bench", "update", "--large", "--seconds", "2", "--out", "{folder}/update.csv"
STUDY = (
    "{python}", "-m", "bench", "study", "--size", "cpu", "--seeds", "10", "--work", "{folder}/../study",
    "--out", "{folder}/study.csv", "--threads", "{cores}",
)  # fmt: skip
HIDDEN_GPU = (("CUDA_VISIBLE_DEVICES", ""),)

PLAN = (
    program("environment", 20),
    program("ceilings", 25, rows="ceilings.csv"),
    selected_tests("graph", GRAPH_TESTS, "cuda_graph and off or no_step_waits", 60),
    step("dino", 75),
    step("selfpatch", 75),
    selected_tests("ops_cuda", OP_TESTS, "cuda-cuda", 55),
    program("race", 45, rows="race.csv"),
    ops("ops", "eager", FIRST_CASES, 55),
    step("ibot", 60),
    # What follows runs in the time that the parts above leave, and with more minutes.
    program("losses", 45, SHOULD),
    step("dino", 75, SHOULD, providers=(OFFICIAL_COMPILED, COMPILED), name="step_dino_compiled"),
    Part("update", UPDATE, 40, SHOULD, rows="update.csv"),
    Part("loader", LOADER, 60, SHOULD, needs=("nvidia.dali",), rows="loader.csv"),
    selected_tests("ops_triton_bf16", OP_TESTS, "cuda-triton and bfloat16", 100, SHOULD, "{cores}"),
    step("sere", 65, SHOULD),
    step("pqcl", 65, SHOULD),
    step("dino", 60, SHOULD, batch=128, providers=(OURS, OFFICIAL)),
    step("selfpatch", 60, SHOULD, batch=128, providers=(OURS, OFFICIAL)),
    selected_tests("graph_compiled", GRAPH_TESTS, "cuda_graph and (fp32-on or bf16-on)", 120, SHOULD),
    selected_tests("compile", COMPILE_TESTS, "traced_whole_and_once", 60, SHOULD),
    sanitizer("memcheck"),
    sanitizer("racecheck"),
    ops("ops_more", "eager", MORE_CASES, 90, SHOULD),
    selected_tests("data", "tests/data", "graph_runs_on_a_gpu or cuda_draws", 30, SHOULD, "2"),
    selected_tests("offsets", OP_TESTS, "beyond_32_bits", 60, MAY, "1"),
    ops("ops_compiled_peers", "compiled", FIRST_CASES, 120, MAY),
    selected_tests("ops_triton", OP_TESTS, "cuda-triton and not bfloat16", 120, MAY, "{cores}"),
    step("selfpatch", 90, MAY, providers=(OFFICIAL_COMPILED, COMPILED), name="step_selfpatch_compiled"),
    step("dino", 75, MAY, arch="vit_base", providers=(OURS, OFFICIAL)),
    step("selfpatch", 75, MAY, arch="vit_base", providers=(OURS, OFFICIAL)),
    Part("study", STUDY, 120, MAY, rows="study.csv"),
    Part("predicted", ("{python}", "-m", "bench.gpu.predicted", "{folder}"), 90, MAY, environment=HIDDEN_GPU),
)
