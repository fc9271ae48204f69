"""Which number format a run gets: what the hardware multiplies, unless it is named."""

import pytest
import torch
from engine.tiny_run import tiny_run, tiny_trainer

from patchlight.engine.precision import CPU_INFO, choose_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fma avx2 avx512f", "fp32"), ("avx512f avx512_bf16", "bf16"), ("amx_tile amx_bf16", "bf16"), (None, "fp32")],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(flags, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    precision, why = choose_precision("auto", CPU, info)
    assert precision == expected
    assert ("no bf16" in why) == (expected == "fp32")


@pytest.mark.parametrize("vectors", ["DEFAULT", "AVX2"])
def test_auto_is_fp32_where_pytorch_is_told_to_use_less(vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx512f avx512_bf16\n")
    precision, why = choose_precision("auto", CPU, tmp_path / "cpuinfo")
    assert (precision, f"uses {vectors} here" in why) == ("fp32", True)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_named_format_is_kept(precision, tmp_path):
    assert choose_precision(precision, CPU, tmp_path / "none")[0] == precision


def test_a_run_says_which_format_it_has_and_why(tmp_path, capsys):
    trainer = tiny_trainer(tiny_run(tmp_path, parallel={"precision": "auto"}))
    expected, why = choose_precision("auto", CPU, CPU_INFO)
    assert trainer.run.parallel.precision == expected
    trainer.begin()
    assert "".join(why.split()) in "".join(capsys.readouterr().out.replace("│", "").split())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_auto_is_bf16_on_a_gpu_of_today():
    assert choose_precision("auto", torch.device("cuda", torch.cuda.current_device()))[0] == "bf16"
