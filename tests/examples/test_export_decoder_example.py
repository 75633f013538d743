from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler"),
    # torch's export and inductor use deprecated parts of torch.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def test_the_compiled_programs_decode_what_generate_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import export_decoder

    small = ["--width", "32", "--depth", "2", "--given", "9", "--new-tokens", "6", "--rounds", "1"]
    rates = export_decoder.main([*small, "--out", str(tmp_path)])
    assert list(rates) == ["generate", "exported", "compiled"]
    assert all(rate > 0 for rate in rates.values())
    assert "times generate" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"encode.pt2", "step.pt2", "step.compiled.pt2"}
