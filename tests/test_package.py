"""The wheel works away from the checkout."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import sparsewav

CHECKOUT = Path(sparsewav.__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not (CHECKOUT / "pyproject.toml").is_file(), reason="not in a checkout")
def test_the_wheel_runs_in_an_empty_environment(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(CHECKOUT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("sparsewav-*.whl")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # The dependencies are borrowed from here, and come after the new environment's own packages. This project's
    # editable install does not come along: its path file counts only in a site folder of the environment itself.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SPARSEWAV_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )

    where = run(str(environment / "bin" / "python"), "-c", "import sparsewav; print(sparsewav.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(environment)
    script = str(environment / "bin" / "sparsewav")
    assert "Worth copying" in run(script, "--help").stdout
    assert (packages / "sparsewav" / "conf" / "config.yaml").is_file()
    assert (packages / "sparsewav" / "inference" / "product.cpp").is_file()
    result = run(script, "experiment=smoke", "allocation=uniform", "saliency=obs", "sparsity.target=0.5")
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(tmp_path.glob("outputs/demo-obs-uniform-0.5-*/model/model.safetensors"))
    module = run(str(environment / "bin" / "python"), "-m", "sparsewav", "--help")
    assert module.stdout == run(script, "--help").stdout
