"""Nothing imports upward, and `import personafast` stays light."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["transformers", "triton", "vllm", "peft", "matplotlib", "trl", "flash_attn"]


def test_nothing_imports_upward():
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, personafast; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(code) == "[]"


def test_importing_the_operators_imports_nothing_heavy():
    code = f"import sys, personafast.ops; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(code) == "[]"


def test_the_command_line_starts_without_torch():
    code = f"import sys, personafast.cli; print([name for name in {['torch', *HEAVY]} if name in sys.modules])"
    assert run(code) == "[]"


def test_every_public_name_resolves():
    code = "import personafast as pf; print([name for name in pf.__all__ if getattr(pf, name, None) is None])"
    assert run(code) == "[]"
